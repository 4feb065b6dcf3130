"""Records the routing of real text, decoded token by token, for `adapmoe simulate`.

A server records live traffic with `--adapmoe-config.trace_out FILE`; this script records given text instead.

    python -m examples.record_trace examples/tiny_mixtral/model examples/tiny_mixtral/heldout /tmp/trace --batch 8
"""

import argparse
import os
from pathlib import Path

from benchmarks.workload import measure_batches, prompts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("text", type=Path, help="folder of *.txt to take prompts from")
    parser.add_argument("output", type=Path, help="trace file to write")
    parser.add_argument("--profile", type=Path, help="profile of the model; also records its next-token predictions")
    parser.add_argument("--batch", type=int, default=1, help="requests per batch")
    parser.add_argument("--batches", type=int, default=24, help="number of batches, run one after another")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all requests of a batch are in its first step
    from vllm_adapmoe.integration.measure.engine import Engine

    length = args.prompt_tokens + args.output_tokens
    prompts = prompts_of(args.model, args.text, args.batch * args.batches, length)
    groups = [prompts[start : start + args.batch] for start in range(0, len(prompts), args.batch)]
    config = {"cache_fraction": 0.5, "trace_out": str(args.output)}
    if args.profile is not None:
        config["profile"] = str(args.profile)
    with Engine(args.model, config, enforce_eager=True, max_model_len=length, forced=True) as engine:
        measure_batches(engine, groups, args.output_tokens, forced=True)
    print(f"{args.output}: {args.output.stat().st_size / 2**10:.0f} KiB; now: adapmoe simulate {args.output}")


if __name__ == "__main__":
    main()
