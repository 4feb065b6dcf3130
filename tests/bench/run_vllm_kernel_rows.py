"""The GPU check's comparison of vLLM's Triton experts on slots, in Triton's interpreter: prints its rows as JSON.

    python run_vllm_kernel_rows.py

What is C++ or CUDA is `cuda_moe_ops`. Once as it is, and twice with a fault: rows of two experts exchanged, and the map
handed to vLLM's own sorting.
"""

import json
import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # or vLLM takes Triton for missing

import torch  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.model_executor.layers.fused_moe import override_config  # noqa: E402

from benchmarks.gpu_check.vllm_kernel_rows import rows_of  # noqa: E402
from tests.integration import cuda_moe_ops  # noqa: E402
from vllm_adapmoe.integration.measure import gpu_check_kernels as check  # noqa: E402

for name in ("moe_align_block_size", "moe_sum"):
    setattr(ops, name, getattr(cuda_moe_ops, name))
TILES = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "SPLIT_K": 1,
         "num_warps": 4, "num_stages": 2}  # fmt: skip
check.TOKENS = (1, 5)


def verdicts() -> list[str]:
    with override_config(TILES):
        cases = check.compare(torch.device("cpu"), torch.float16, seed=1)
    return [row.verdict for row in rows_of([check.asdict(case) for case in cases], torch.float16)]


results = {"right": verdicts()}
run = check.Kernel.run


def exchanged(self, x, weights, ids, row_of=None):
    return run(self, x, weights, ids, None if row_of is None else row_of[[1, 0, *range(2, len(row_of))]])


check.Kernel.run = exchanged
results["exchanged"] = verdicts()
check.Kernel.run, check.run_on_slots = run, lambda experts, num_experts: None
try:
    results["own sorting"] = verdicts()
except cuda_moe_ops.OutOfBounds as error:
    results["own sorting"] = str(error)
print(json.dumps(results))
