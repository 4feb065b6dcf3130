"""Tests vLLM's Triton experts on pools of slots for the GPU check, in its own process.

    python -m vllm_adapmoe.integration.measure.gpu_check_kernels SEED

Prints a line with `gpu_check.MARK` and the results of `compare` as JSON.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from vllm_adapmoe.integration.layers.slot_kernels import run_on_slots
from vllm_adapmoe.integration.measure.gpu_check import MARK

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 128, 64
POOLS = (10, 5000)
"""Numbers of slots: a few more than experts, and more ids than vLLM can sort pairs for."""
TOKENS = (1, 16, 200)
DROPPED = 0.3


@dataclass(frozen=True)
class Case:
    """Results for one pool size and number of tokens."""

    slots: int
    tokens: int
    error: float
    """Greatest difference to float64, relative to the greatest output."""
    same: bool
    """Whether the output is bit-identical to the kernel without slots."""
    dropped: bool
    """Whether the output with dropped pairs is bit-identical to weights of zero for them without slots."""
    nothing: bool
    """Whether the output is zero if everything is dropped."""


class Kernel:
    """vLLM's Triton experts of a layer, on weights `[rows, ...]`.

    Args:
        weights: weights of both projections.
        on_slots: whether rows are slots, and every call gets a map.
    """

    def __init__(self, weights: tuple[torch.Tensor, torch.Tensor], on_slots: bool) -> None:
        config = FusedMoEConfig(
            num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=INNER,
            num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=MoEActivation.SILU,
            in_dtype=weights[0].dtype, moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            device=weights[0].device.type, routing_method=RoutingMethodType.TopK, max_num_tokens=max(TOKENS),
        )  # fmt: skip
        self.weights, self.experts = weights, TritonExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
        if on_slots:
            run_on_slots(self.experts, EXPERTS)

    def run(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, row_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns outputs `[tokens, hidden]`; workspaces and output start as NaN, to detect unwritten reads."""

        def unwritten(*size: int) -> torch.Tensor:
            return x.new_full(size, float("nan"))

        output, size = unwritten(*x.shape), (len(x), TOP_K, max(2 * INNER, HIDDEN))
        self.experts.apply(
            output, x.clone(), *self.weights, weights, ids, MoEActivation.SILU, EXPERTS, row_of, None, None,
            unwritten(*size), unwritten(*size), None, False,
        )  # fmt: skip
        return output


def compare(device: torch.device, dtype: torch.dtype, seed: int) -> list[Case]:
    """Returns the results for every pool size with every number of tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    w1 = (normal(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5).to(dtype)
    w2 = (normal(EXPERTS, HIDDEN, INNER) / INNER**0.5).to(dtype)
    whole = Kernel((w1, w2), on_slots=False)
    cases = []
    for slots in POOLS:
        chosen = torch.randperm(slots, generator=generator, device=device)[:EXPERTS]
        pool = tuple(weight.new_full((slots, *weight.shape[1:]), float("nan")) for weight in (w1, w2))
        for part, weight in zip(pool, (w1, w2), strict=True):
            part[chosen] = weight
        row_of = torch.cat((chosen.int(), chosen.new_full((1,), -1, dtype=torch.int32)))
        kernel = Kernel((pool[0], pool[1]), on_slots=True)
        for tokens in TOKENS:
            x = normal(tokens, HIDDEN).to(dtype)
            weights = torch.rand(tokens, TOP_K, generator=generator, device=device) + 0.1
            order = torch.rand(tokens, EXPERTS, generator=generator, device=device).argsort(1)
            ids = order[:, :TOP_K].int().contiguous()
            dropped = torch.rand(tokens, TOP_K, generator=generator, device=device) < DROPPED
            output, expected = kernel.run(x, weights, ids, row_of), _reference(x, weights, ids, w1, w2)
            masked = whole.run(x, weights * ~dropped, ids)
            error = (output.double() - expected).abs().max() / expected.abs().max()
            cases.append(
                Case(
                    slots, tokens, float(error) if bool(output.isfinite().all()) else float("inf"),
                    torch.equal(output, whole.run(x, weights, ids)),
                    torch.equal(kernel.run(x, weights, ids.masked_fill(dropped, EXPERTS), row_of), masked),
                    not kernel.run(x, weights, torch.full_like(ids, EXPERTS), row_of).any(),
                )
            )  # fmt: skip
    return cases


def _reference(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(EXPERTS):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ w1[expert].double().T).chunk(2, 1)
        value = (torch.nn.functional.silu(gate) * up) @ w2[expert].double().T
        output.index_add_(0, token, value * weights[token, choice, None].double())
    return output


def main() -> None:
    """Runs `compare` on the GPU, and prints the results."""
    with set_current_vllm_config(VllmConfig()):
        cases: list[dict[str, Any]] = [
            asdict(case) for case in compare(torch.device("cuda"), torch.bfloat16, int(sys.argv[1]))
        ]
    print(f"\n{MARK}{json.dumps(cases)}", flush=True)


if __name__ == "__main__":
    main()
