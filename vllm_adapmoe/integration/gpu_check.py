"""One engine of the GPU check, in a process of its own that decodes whenever it is told to.

    python -m vllm_adapmoe.integration.gpu_check MODEL KIND RESIDENT EXPERT_BYTES TOKENS

For each line on its input it decodes once and answers with a line of JSON after `MARK`, tokens per second; vLLM's own
words go where they like.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from vllm_adapmoe.integration.engine import Engine
from vllm_adapmoe.integration.forced_tokens import ForcedTokens

MARK = "gpu-check: "
GROUP = 4
"""Layers of a group of vLLM's prefetch offloading, so that it offloads 1, 2 or 3 quarters of them."""
PROMPT_TOKENS = 16
EXPERTS = "experts"
"""Part of the parameters' names."""


def engine_arguments(kind: str, resident: float, expert_bytes: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Configuration of the expert cache, None without it, and further arguments of `LLM`.

    Each leaves the same bytes of experts on the device.

    Args:
        kind: `stock`, `adapmoe`, `uva` (`cpu_offload_gb`) or `prefetch` (offloading layer by layer).
        resident: share of the experts on the device.
        expert_bytes: of all layers.
    """
    if kind == "adapmoe":
        return {"cache_fraction": resident, "store": "host"}, {}
    if kind == "uva":
        return None, {"cpu_offload_gb": (1 - resident) * expert_bytes / 2**30, "cpu_offload_params": {EXPERTS}}
    if kind == "prefetch":
        layers = round((1 - resident) * GROUP)
        return None, {"offload_group_size": GROUP, "offload_num_in_group": layers, "offload_params": {EXPERTS}}
    return None, {}


def main() -> None:
    """Starts the engine, says so, and serves its input to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("kind")
    parser.add_argument("resident", type=float)
    parser.add_argument("expert_bytes", type=int)
    parser.add_argument("tokens", type=int)
    options = parser.parse_args()
    adapmoe, arguments = engine_arguments(options.kind, options.resident, options.expert_bytes)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    chance = random.Random(0)
    ids = [chance.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS + options.tokens)]
    with Engine(
        options.model,
        adapmoe,
        load_format="dummy",
        max_model_len=len(ids),
        max_num_seqs=1,
        # Others are on the device too; the KV cache has a size of its own.
        gpu_memory_utilization=0.1,
        # Random tokens: what a model without sense says soon repeats itself, and with it its experts.
        logits_processors=[ForcedTokens],
        **arguments,
    ) as engine:

        def decode() -> float:
            run = engine.generate([ids[:PROMPT_TOKENS]], options.tokens, [ids[PROMPT_TOKENS:]])
            return (options.tokens - 1) / run.decode_seconds

        decode()
        print(f"{MARK}{json.dumps('ready')}", flush=True)
        for _ in sys.stdin:
            print(f"{MARK}{json.dumps(decode())}", flush=True)


if __name__ == "__main__":
    main()
