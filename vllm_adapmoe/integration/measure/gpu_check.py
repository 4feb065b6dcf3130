"""Runs one engine of the GPU check in its own process, decoding on command.

    python -m vllm_adapmoe.integration.measure.gpu_check MODEL KIND RESIDENT EXPERT_BYTES TOKENS DEVICE_BYTES

For each input line it decodes once and prints a line with `MARK` and the tokens per second as JSON, among vLLM's own
output.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.model_folder import vocabulary_size

MARK = "gpu-check: "
GROUP = 4
"""Layers per group of vLLM's prefetch offloading, so that 1, 2 or 3 quarters of them are offloaded."""
PROMPT_TOKENS = 16
BATCHED_TOKENS = 2048
"""Maximum tokens of a step, with which vLLM measures its memory."""
EXPERTS = "experts"
"""Part of the experts' parameter names."""


def engine_arguments(kind: str, resident: float, expert_bytes: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Returns the configuration of the expert cache, None without it, and further arguments of `LLM`.

    Every kind but `stock` keeps the same bytes of experts on the device.

    Args:
        kind: `stock`, `adapmoe`, `uva` (`cpu_offload_gb`) or `prefetch` (offloading layer by layer).
        resident: fraction of the experts on the device.
        expert_bytes: bytes of the experts of all layers.
    """
    if kind == "adapmoe":
        return {"cache_fraction": resident, "store": "host"}, {}
    if kind == "uva":
        return None, {"cpu_offload_gb": (1 - resident) * expert_bytes / 2**30, "cpu_offload_params": {EXPERTS}}
    if kind == "prefetch":
        layers = round((1 - resident) * GROUP)
        return None, {"offload_group_size": GROUP, "offload_num_in_group": layers, "offload_params": {EXPERTS}}
    return None, {}


def device_arguments(device_bytes: int) -> dict[str, Any]:
    """Returns the arguments of `LLM` that limit an engine sharing the device to `device_bytes`."""
    if not current_platform.is_cuda():
        return {}
    return {"gpu_memory_utilization": min(0.9, device_bytes / current_platform.get_device_total_memory())}


def main() -> None:
    """Starts the engine, prints that it is ready, and decodes once per input line until the end of input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("kind")
    parser.add_argument("resident", type=float)
    parser.add_argument("expert_bytes", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("device_bytes", type=int)
    options = parser.parse_args()
    adapmoe, arguments = engine_arguments(options.kind, options.resident, options.expert_bytes)
    vocabulary = vocabulary_size(options.model)
    chance = random.Random(0)
    ids = [chance.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS + options.tokens)]
    with Engine(
        options.model,
        adapmoe,
        # Random forced tokens, because the output of a random model soon repeats, and so do its experts.
        forced=True,
        load_format="dummy",
        max_model_len=len(ids),
        max_num_seqs=1,
        max_num_batched_tokens=BATCHED_TOKENS,
        **device_arguments(options.device_bytes),
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
