"""The GPU check's kernel on slots, in Triton's interpreter, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_check.expert_kernel import run_experts
from vllm_adapmoe.device import MAX_TOKENS

TOLERANCE = 2**-9
"""Of the largest output: what float16 (the interpreter has no bf16) loses between the two projections."""


def reference(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token, choice in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, choice])
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        output[token] += weights[token, choice].double() * (
            down[expert].double() @ (torch.nn.functional.silu(gate) * up)
        )
    return output


def case(tokens: int, top_k: int, experts: int, hidden: int, inner: int, dropped: float, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(tokens, hidden).half()
    gate_up = (normal(experts, 2 * inner, hidden) / hidden**0.5).half()
    down = (normal(experts, hidden, inner) / inner**0.5).half()
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).int()
    ids[torch.rand(ids.shape, generator=generator) < dropped] = -1
    return x, torch.rand(tokens, top_k, generator=generator), ids, gate_up, down


def run(x, weights, ids, gate_up, down) -> torch.Tensor:
    return run_experts(x, weights, ids, gate_up, down, torch.arange(len(down), dtype=torch.int32))


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "dropped"),
    [
        pytest.param(1, 2, 8, 256, 128, 0.0, id="decode, top-2"),
        pytest.param(3, 4, 16, 200, 72, 0.2, id="sizes that no block divides"),
        pytest.param(20, 8, 32, 64, 48, 0.3, id="many tokens of an expert"),
        pytest.param(MAX_TOKENS, 2, 2, 64, 32, 0.0, id="every token wants both"),
        pytest.param(2, 2, 8, 64, 32, 1.0, id="all dropped"),
    ],
)
def test_equals_float64(tokens, top_k, experts, hidden, inner, dropped):
    inputs = case(tokens, top_k, experts, hidden, inner, dropped, seed=tokens)
    expected = reference(*inputs)
    error = (run(*inputs).double() - expected).abs().max()
    assert error <= TOLERANCE * max(1.0, expected.abs().max())


def test_slots_and_neighbours_change_nothing():
    """Bit for bit: in which slots experts are, what the others hold, and which tokens are beside one."""
    x, weights, ids, gate_up, down = case(5, 3, 8, 96, 40, 0.2, seed=1)
    together = run(x, weights, ids, gate_up, down)
    slots = torch.randperm(11, generator=torch.Generator().manual_seed(2))[:8]
    pools = [one.new_full((11, *one.shape[1:]), float("nan")) for one in (gate_up, down)]
    for pool, one in zip(pools, (gate_up, down), strict=True):
        pool[slots] = one
    row_of = torch.cat((slots, torch.tensor([-1]))).int()
    assert torch.equal(run_experts(x, weights, ids, *pools, row_of), together)
    for token in range(5):
        one = slice(token, token + 1)
        assert torch.equal(run(x[one], weights[one], ids[one], gate_up, down), together[one])


def test_an_expert_without_a_slot_adds_nothing():
    x, weights, ids, gate_up, down = case(5, 3, 8, 96, 40, 0.2, seed=1)
    row_of = torch.arange(8, dtype=torch.int32)
    row_of[3] = -1
    without = run(x, weights, ids.masked_fill(ids == 3, -1), gate_up, down)
    assert (ids == 3).any() and torch.equal(run_experts(x, weights, ids, gate_up, down, row_of), without)


@given(tokens=st.integers(1, 6), top_k=st.integers(1, 4), dropped=st.sampled_from((0.0, 0.5)), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_any_routing(tokens, top_k, dropped, seed):
    inputs = case(tokens, top_k, 5, 32, 16, dropped, seed)
    expected = reference(*inputs)
    assert (run(*inputs).double() - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


def test_too_many_tokens():
    with pytest.raises(ValueError, match="65 tokens"):
        run(*case(MAX_TOKENS + 1, 1, 2, 32, 16, 0.0, seed=0))
