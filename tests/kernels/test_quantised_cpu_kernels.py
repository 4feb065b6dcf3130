"""vLLM's x86 kernels for quantised experts against fp64 on the same integers, at sizes of real models.

Where a CPU has no AMX they compute with AVX-512, which vLLM does not offer by itself (`entry/edits.py`).
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

from vllm_adapmoe.integration.compat import QUANTISED_ON_CPU, runs_quantised_experts
from vllm_adapmoe.precision.rounding import pack_int4, round_to_int4, round_to_int8

SIZES = {
    "Qwen3-30B-A3B": (2048, 768, 8, 16),
    "DeepSeek-V2-Lite": (2048, 1408, 6, 8),
    "slots": (512, 256, 8, 144),
}
"""Hidden size, intermediate size, top-k and rows of the weights. With many rows, as slots are, the kernel for int8
takes its path for few tokens in prompts too."""
BLOCK = 128


class Experts(NamedTuple):
    """Experts in a kernel's format, and as the fp64 matrices that it stands for."""

    method: CPUQuantMethod
    weights: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor]
    zeros: tuple[torch.Tensor | None, torch.Tensor | None]
    block: list[int] | None
    exact: tuple[torch.Tensor, torch.Tensor]


def int8(w13: torch.Tensor, w2: torch.Tensor) -> Experts:
    packed, scales, exact = [], [], []
    for weight in (w13, w2):
        rounded = [round_to_int8(expert) for expert in weight]
        integers, scale = (torch.stack(parts) for parts in list(zip(*rounded, strict=True))[:2])
        packed.append(torch.ops._C.convert_weight_packed(integers))
        scales.append(scale)
        exact.append(integers.double() * scale.double())
    return Experts(CPUQuantMethod.INT8_W8A8, tuple(packed), tuple(scales), (None, None), None, tuple(exact))


def int4(w13: torch.Tensor, w2: torch.Tensor, group: int = 64) -> Experts:
    packed, scales, exact = [], [], []
    for weight in (w13, w2):
        rounded = [round_to_int4(expert, group, torch.bfloat16) for expert in weight]
        integers, scale = (torch.stack(parts) for parts in list(zip(*rounded, strict=True))[:2])
        packed.append(pack_int4(integers).transpose(1, 2).contiguous())
        scales.append(scale.transpose(1, 2).contiguous())
        exact.append((integers.double().unflatten(2, (-1, group)) * scale.double().unsqueeze(3)).flatten(2))
    converted = cpu_moe.prepare_int4_moe_layer_for_cpu(*packed, *scales)
    return Experts(CPUQuantMethod.INT4_W4A8, converted[:2], converted[2:4], converted[4:], None, tuple(exact))


def fp8_blocks(w13: torch.Tensor, w2: torch.Tensor) -> Experts:
    packed, scales, exact = [], [], []
    for weight in (w13, w2):
        blocks = weight.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax((2, 4)) / 448
        values = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
        packed.append(values.flatten(1, 2).flatten(2))
        scales.append(scale)
        exact.append((values.double() * scale.double()[:, :, None, :, None]).flatten(1, 2).flatten(2))
    converted = cpu_moe.prepare_fp8_moe_layer_for_cpu(*packed)
    return Experts(CPUQuantMethod.FP8_W8A16, converted, tuple(scales), (None, None), [BLOCK, BLOCK], tuple(exact))


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
"""Values of MXFP4's codes, by the OCP specification of microscaling formats."""


def mxfp4(w13: torch.Tensor, w2: torch.Tensor) -> Experts:
    packed, scales, exact = [], [], []
    generator = torch.Generator().manual_seed(2)
    for weight in (w13, w2):
        codes = torch.randint(0, 16, weight.shape, generator=generator, dtype=torch.uint8)
        exponents = torch.randint(118, 122, (*weight.shape[:2], weight.shape[2] // 32), generator=generator)
        packed.append(codes[..., ::2] | codes[..., 1::2] << 4)
        scales.append(exponents.to(torch.uint8))
        powers = torch.exp2(exponents.double() - 127)
        exact.append((FP4[codes.long()].unflatten(2, (-1, 32)) * powers.unsqueeze(3)).flatten(2))
    converted = cpu_moe.prepare_mxfp4_moe_layer_for_cpu(*packed, *scales)
    return Experts(CPUQuantMethod.MXFP4, converted[:2], converted[2:], (None, None), None, tuple(exact))


FORMATS: dict[str, Callable[[torch.Tensor, torch.Tensor], Experts]] = {
    "int8": int8, "int4": int4, "int4_groups_of_32": partial(int4, group=32), "fp8_blocks": fp8_blocks, "mxfp4": mxfp4
}  # fmt: skip
TOLERANCE = {"int8": 0.02, "int4": 0.02, "int4_groups_of_32": 0.02, "fp8_blocks": 0.01, "mxfp4": 0.01}
"""Of the norm of a token's output: bf16 has 8 bits. With int8 and int4 a value that rounds to the other side of a half
changes by a whole step of its token's 8 bits."""


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """What the kernels for int8 and int4 make of their inputs, twice: bf16, then 8 bits with a scale for each token."""
    x = x.to(torch.bfloat16).double()
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def reference(experts: Experts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    w13, w2 = experts.exact
    eight_bits = experts.method in (CPUQuantMethod.INT8_W8A8, CPUQuantMethod.INT4_W4A8)
    take = rounded_inputs if eight_bits else lambda values: values
    inputs = take(x.double())
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(w13)):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (inputs[token] @ w13[expert].T).chunk(2, dim=1)
        outputs = take(torch.nn.functional.silu(gate) * up) @ w2[expert].T
        total.index_add_(0, token, outputs * weights[token, choice].double().unsqueeze(1))
    return total


@pytest.fixture(autouse=True)
def supported():
    if not runs_quantised_experts():
        pytest.skip("vLLM's x86 kernels for quantised experts need AMX, or AVX-512 with VNNI and bf16")


def test_offered_without_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    kernels = [getattr(cpu_moe, name) for name in QUANTISED_ON_CPU]
    assert all(kernel._supports_current_device() for kernel in kernels)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not any(kernel._supports_current_device() for kernel in kernels)


def test_offered_with_every_router_that_weighs_outputs():
    """The router has chosen experts and weights before. Llama 4 weighs inputs, which `apply` of each kernel refuses."""
    for name in QUANTISED_ON_CPU:
        kernel = getattr(cpu_moe, name)
        assert issubclass(kernel, FusedMoEExpertsModular), "a monolithic kernel would route by itself"
        taken = {method for method in RoutingMethodType if kernel._supports_routing_method(method, None, None)}
        assert taken == set(RoutingMethodType) - {RoutingMethodType.Llama4}
        assert "apply_router_weight_on_input" in inspect.getsource(kernel.apply)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_decode_and_prompts(name, model):
    hidden, inner, top_k, rows = SIZES[model]
    generator = torch.Generator().manual_seed(0)
    w13 = 0.03 * torch.randn(rows, 2 * inner, hidden, generator=generator)
    w2 = 0.03 * torch.randn(rows, hidden, inner, generator=generator)
    experts = FORMATS[name](w13, w2)
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        ids = torch.rand(tokens, rows, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
        weights = torch.rand(tokens, top_k, generator=generator)
        output = torch.empty_like(x)
        fused_experts_cpu(
            output, x, *experts.weights, weights, ids, experts.method, *experts.scales, *experts.zeros, experts.block,
            None, None, None, None, True,
        )  # fmt: skip
        expected = reference(experts, x, weights, ids)
        error = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < TOLERANCE[name], f"{tokens} tokens"
