"""One engine in this process that estimates room for 48 experts, and for which vLLM measures 20 experts less.

python run_short_of_memory.py MODEL CONFIG

The estimates and the measurement are made up, for on the CPU both are as precise as the resident memory of a process;
what follows from them is real. Prints tokens, statistics, and how many slots there were `before`.
"""

import json
import sys

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adapmoe.integration.loading.memory import min_kv_cache
from vllm_adapmoe.integration.loading.slot_pools import SlotPools
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.planning.slot_budget import DeviceMemory

BEFORE, LESS = 48, 20
EXPERT_BYTES = 3 * 128 * 256 * 2
"""Of the bundled model."""


def measured(worker: CPUWorker) -> int:
    """What vLLM would leave to slots and KV cache together."""
    needed, _ = min_kv_cache(worker.vllm_config)
    return (BEFORE - LESS) * EXPERT_BYTES + needed


# Here, and not in `main`, for the processes that vLLM starts: they import this file.
SlotPools._memory = lambda pools, resident: DeviceMemory(BEFORE * EXPERT_BYTES)  # type: ignore[method-assign]
CPUWorker.determine_available_memory = measured  # type: ignore[method-assign]


def main() -> None:
    args = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": None,
        "gpu_memory_utilization": 0.2,
    }
    engine = Engine(sys.argv[1], json.loads(sys.argv[2]), **args)
    prompts = [[5 + number, 17, 301, 42, 88, 7] * 4 for number in range(3)]
    run = engine.generate(prompts, 24)
    print(json.dumps({"tokens": run.tokens, "stats": engine.cache_stats(), "before": BEFORE}))
    engine.close()


if __name__ == "__main__":
    main()
