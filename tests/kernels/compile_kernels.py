"""Compiles the kernels for a GPU that need not be there, as a call would: prints their PTX and resources as JSON.

    python compile_kernels.py CAPABILITY

Arguments and their specialisation (which sizes and pointers are known to be multiples of 16) are those of Triton's own
launcher on a real call of `experts_by_address`; only the driver's answers are given here, and nothing is launched.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_adapmoe.device.experts_by_address import experts_by_address

HIDDEN, INNER, EXPERTS = 2048, 768, 8
STEPS = ((1, 8), (64, 8))
"""Tokens and experts of each: the smallest and the largest tile."""

target = GPUTarget("cuda", int(sys.argv[1]), 32)
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
)
launch, compiled = JITFunction.run, []


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> None:
    kernel = launch(self, *args, grid=grid, warmup=True, **sizes)
    compiled.append(
        {"kernel": kernel.name, "ptx": kernel.asm["ptx"], "machine_code": len(kernel.asm["cubin"]),
         "shared": kernel.metadata.shared, "stages": kernel.metadata.num_stages}
    )  # fmt: skip


JITFunction.run = compile_only  # type: ignore[method-assign]
for tokens, top_k in STEPS:
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    ids = torch.arange(top_k, dtype=torch.int32).repeat(tokens, 1)
    table = torch.zeros(EXPERTS, dtype=torch.int64)
    experts_by_address(x, torch.ones(tokens, top_k), ids, table, table, INNER)
print(json.dumps(compiled))
