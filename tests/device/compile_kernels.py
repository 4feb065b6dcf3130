"""Compiles the kernels for a GPU that need not be there, as a call would: prints their PTX and resources as JSON.

    python compile_kernels.py CAPABILITY

Arguments and their specialisation (which sizes and pointers are known to be multiples of 16) are those of Triton's own
launcher on real calls of `BatchGate`, `claim` and `Fetch`; only the driver's answers are given here, and nothing is
launched.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.device.batch_gate import BatchGate
from vllm_adapmoe.device.claim import claim
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.fetch import Fetch
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.device.residency import DeviceResidency, Loads
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.policy.eviction import POLICIES
from vllm_adapmoe.policy.residency import Residency
from vllm_adapmoe.store.record import RecordLayout

CPU = torch.device("cpu")
STEPS = (("lru", 8, 4, 1, 2, False), ("next_use", 48, 128, 8, 8, True), ("next_token", 94, 512, 64, 16, True))
"""Eviction, layers, experts, tokens and experts of each; floors: the smallest and the largest that is promised."""

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
         "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    )  # fmt: skip


JITFunction.run = compile_only  # type: ignore[method-assign]
for eviction, layers, experts, tokens, top_k, floors in STEPS:
    residency = Residency(experts, 0, POLICIES[eviction](layers, experts), [0] * layers if floors else None)
    state = DeviceResidency(residency, torch.ones(layers, experts, dtype=torch.int64), CPU)
    state.upload(residency, [])
    ids, routing = torch.zeros(tokens, top_k, dtype=torch.int32), DeferredRouting(layers, tokens, top_k, CPU)
    weights, outputs = torch.zeros(tokens, top_k), torch.zeros(tokens, 2 * experts)
    gating: Any = SimpleNamespace(plan=GatingPlan(rule="batch", sensitivity=[1.0] * layers), threshold=1.0)
    gate = BatchGate(gating, experts, CPU)(0, weights, ids, routing.rows, state.slot_of)
    for layer in (0, 1, layers - 1):  # one kernel for all layers but the last, which prefetches nothing
        chosen = Chosen(ids, gate.keep_mask, gate.cost)
        predicted = Predicted(outputs if eviction == "next_token" else None, experts, ids.long())
        claim(state, Loads(experts, CPU), layer, chosen, routing, predicted, 8)
layout = RecordLayout.of({"weights": torch.empty(1, 4096, dtype=torch.uint8), "scale": torch.empty(1, 1)})
Fetch(SlotPool(layout, 2, CPU))(Loads(8, CPU), 1)
print(json.dumps(compiled))
