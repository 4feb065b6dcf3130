"""vLLM's own Triton and Marlin experts on slots, through maps: Triton's kernels in its interpreter, what is C++ or CUDA
as `cuda_moe_ops` has it. Prints what failed, or nothing."""

import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # or vLLM takes Triton for missing

import torch  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.model_executor.layers.fused_moe import override_config  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import (  # noqa: E402
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
    int4_w4a16_moe_quant_config,
    int8_w8a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe  # noqa: E402

from tests.integration import cuda_moe_ops  # noqa: E402
from vllm_adapmoe.integration.layers.slot_kernels import run_on_slots  # noqa: E402

for name in ("moe_align_block_size", "moe_sum", "moe_wna16_marlin_gemm", "scaled_fp8_quant"):
    setattr(ops, name, getattr(cuda_moe_ops, name))

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 5, 2, 8, 64, 32
GROUP = 32
GENERATOR = torch.Generator().manual_seed(0)
CONFIG = FusedMoEConfig(
    num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=INNER,
    num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=MoEActivation.SILU, in_dtype=torch.float16,
    moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), device="cpu", routing_method=RoutingMethodType.TopK,
    max_num_tokens=64,
)  # fmt: skip
TILES = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "SPLIT_K": 1,
         "num_warps": 4, "num_stages": 2}  # fmt: skip


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def weights_of(kind):
    """Tensors `[experts, ...]` by name."""
    w1, w2 = randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5, randn(EXPERTS, HIDDEN, INNER) / INNER**0.5
    if kind == "fp16":
        return {"w1": w1.half(), "w2": w2.half()}
    if kind == "int8":
        scales = {f"s{n}": w.abs().amax(-1, keepdim=True).repeat(1, 1, w.shape[-1] // GROUP) / 127
                  for n, w in ((1, w1), (2, w2))}  # fmt: skip
        packed = {f"w{n}": ((w / scales[f"s{n}"][..., :1]).round().to(torch.int16) + 128).to(torch.uint8)
                  for n, w in ((1, w1), (2, w2))}  # fmt: skip
        return packed | {name: scale.half() for name, scale in scales.items()}
    if kind == "int4":
        packed = {
            name: torch.randint(0, 256, (EXPERTS, rows, columns // 2), generator=GENERATOR).to(torch.uint8)
            for name, rows, columns in (("w1", 2 * INNER, HIDDEN), ("w2", HIDDEN, INNER))
        }
        scales = {
            name: (randn(EXPERTS, rows, columns // GROUP).abs() / 60).half()
            for name, rows, columns in (("s1", 2 * INNER, HIDDEN), ("s2", HIDDEN, INNER))
        }
        return packed | scales
    if kind.startswith("fp8"):
        over = (-1,) if kind == "fp8_channel" else (-1, -2)
        scales = {f"s{n}": w.abs().amax(over, keepdim=True) / 448 for n, w in ((1, w1), (2, w2))}
        packed = {f"w{n}": (w / scales[f"s{n}"]).to(torch.float8_e4m3fn) for n, w in ((1, w1), (2, w2))}
        return packed | {name: scale.squeeze(over[1:]) for name, scale in scales.items()}
    assert kind == "marlin"
    names = torch.arange(2 * EXPERTS).view(2, EXPERTS)
    for name, matrix in zip(names.view(-1).tolist(), (*w1, *w2), strict=True):
        cuda_moe_ops.MARLIN_WEIGHTS[name] = matrix
    return {
        "w1": names[0].int().view(-1, 1, 1).repeat(1, HIDDEN // 16, 4 * INNER),
        "w2": names[1].int().view(-1, 1, 1).repeat(1, INNER // 16, 2 * HIDDEN),
        "s1": torch.ones(EXPERTS, 1, 1), "s2": torch.ones(EXPERTS, 1, 1),
    }  # fmt: skip


def kernel_of(kind, tensors):
    s1, s2 = tensors.get("s1"), tensors.get("s2")
    if kind == "fp16":
        return triton_moe.TritonExperts(CONFIG, FUSED_MOE_UNQUANTIZED_CONFIG)
    if kind == "int8":
        return triton_moe.TritonWNA16Experts(CONFIG, int8_w8a16_moe_quant_config(s1, s2, block_shape=[0, GROUP]))
    if kind == "int4":
        return triton_moe.TritonWNA16Experts(CONFIG, int4_w4a16_moe_quant_config(s1, s2, block_shape=[0, GROUP]))
    if kind.startswith("fp8"):  # with a scale of the activations for each token, or one for all
        rows = kind == "fp8_channel"
        quant = fp8_w8a8_moe_quant_config(s1, s2, per_act_token_quant=rows, per_out_ch_quant=rows)
        return triton_moe.TritonExperts(CONFIG, quant)
    return marlin_moe.MarlinExperts(CONFIG, int4_w4a16_moe_quant_config(s1, s2))


def run(kind, kernel, tensors, x, weights, ids, expert_map=None):
    """`apply`, with workspaces and outputs in which everything that is read unwritten shows."""
    nan = lambda *shape: torch.full(shape, float("nan"), dtype=torch.float16)  # noqa: E731
    size = 2 * len(x) * TOP_K * max(2 * INNER, HIDDEN)
    output, scale = nan(len(x), HIDDEN), None
    x = x.clone()
    if kind.startswith("fp8"):
        x, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=kind == "fp8_channel")
    kernel.apply(
        output, x, tensors["w1"], tensors["w2"], weights, ids, MoEActivation.SILU, EXPERTS, expert_map,
        scale, None, nan(size), nan(size), None, False,
    )  # fmt: skip
    return output


def on_slots(tensors, slots, count):
    """The same experts in a pool, where every other slot shows whoever reads it."""
    pools = {}
    for name, tensor in tensors.items():
        pool = torch.full((count, *tensor.shape[1:]), -1 if tensor.dtype == torch.int32 else 0, dtype=tensor.dtype)
        if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn:
            pool.fill_(float("nan"))
        pool[slots] = tensor
        pools[name] = pool
    return pools


def check(kind, count, tokens):
    x, weights = randn(tokens, HIDDEN).half(), torch.rand(tokens, TOP_K, generator=GENERATOR)
    ids = torch.stack([torch.randperm(EXPERTS, generator=GENERATOR)[:TOP_K] for _ in range(tokens)]).int()
    tensors = weights_of(kind)
    whole = run(kind, kernel_of(kind, tensors), tensors, x, weights, ids)
    assert whole.isfinite().all(), "stock"

    slots = torch.randperm(count, generator=GENERATOR)[:EXPERTS]
    pools = on_slots(tensors, slots, count)
    kernel = kernel_of(kind, pools)
    run_on_slots(kernel, EXPERTS)
    row_of = torch.cat((slots.int(), torch.tensor([-1], dtype=torch.int32)))

    def ours(ids, row_of):
        return run(kind, kernel, pools, x, weights, ids, row_of)

    assert torch.equal(ours(ids, row_of), whole), "slots"

    assert (ours(torch.full_like(ids, EXPERTS), row_of) == 0).all(), "nothing kept"
    if kind == "fp8_tensor":
        return  # the scale is of all rows: what is dropped, or in another wave, changes those of the others

    dropped = torch.rand(tokens, TOP_K, generator=GENERATOR) < 0.4
    dropped[0] = torch.tensor([True, tokens > 1])  # of several tokens, one is padding
    kept = run(kind, kernel_of(kind, tensors), tensors, x, weights * ~dropped, ids)
    assert torch.equal(ours(torch.where(dropped, EXPERTS, ids), row_of), kept), "dropped"

    first = torch.arange(EXPERTS + 1) < EXPERTS // 2
    waves = [ours(torch.where(wave[ids], ids, EXPERTS), row_of).float() for wave in (first, ~first)]
    error = (sum(waves) - whole.float()).abs().max() / whole.float().abs().max()
    assert error < 2**-9, f"waves: {error}"


def check_planted_fault():
    """What was shipped once: the map handed to vLLM's own sorting."""
    tensors = weights_of("fp16")
    slots = torch.arange(100, 100 + EXPERTS)
    pools = on_slots(tensors, slots, 200)
    row_of = torch.cat((slots.int(), torch.tensor([-1], dtype=torch.int32)))
    ids, weights = torch.zeros(TOKENS, TOP_K, dtype=torch.int32), torch.ones(TOKENS, TOP_K)
    try:
        run("fp16", kernel_of("fp16", tensors), pools, randn(TOKENS, HIDDEN).half(), weights, ids, row_of)
    except cuda_moe_ops.OutOfBounds:
        return
    raise AssertionError("vLLM's own sorting takes slots for experts, unnoticed")


def check_tiles():
    """Tuned tiles are those of the number of experts."""
    asked = []
    choose = triton_moe.try_get_optimal_moe_config
    triton_moe.try_get_optimal_moe_config = lambda w1, w2, *args, **kwargs: asked.append((w1[0], w2[0])) or TILES
    try:
        tensors = weights_of("fp16")
        kernel = kernel_of("fp16", tensors)
        run_on_slots(kernel, EXPERTS)
        pools = on_slots(tensors, torch.arange(EXPERTS), 50)
        row_of = torch.arange(EXPERTS + 1, dtype=torch.int32)
        row_of[-1] = -1
        run("fp16", kernel, pools, randn(TOKENS, HIDDEN).half(), torch.ones(TOKENS, TOP_K),
            torch.zeros(TOKENS, TOP_K, dtype=torch.int32), row_of)  # fmt: skip
    finally:
        triton_moe.try_get_optimal_moe_config = choose
    assert asked == [(EXPERTS, EXPERTS)], asked


with override_config(TILES):
    for kind in sys.argv[1].split(","):
        for count, tokens in ((10, TOKENS), (1100, TOKENS), (5000, TOKENS), (1100, 1)):
            check(kind, count, tokens)  # the pairs of one token are not sorted
check_planted_fault()
check_tiles()
