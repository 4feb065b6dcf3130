"""Gating by batch on the GPU, in Triton's interpreter: what `gate_batch` drops on the host, and the same budget."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_adapmoe.device.batch_gate import BatchGate
from vllm_adapmoe.gating.loss_budget import LossBudget
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.gating.rules import gate_batch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows without an expert divide by zero, masked
CPU = torch.device("cpu")


def gate_of(threshold: float, sensitivity: list[float], nats_per_token: float | None = None) -> BatchGate:
    plan = GatingPlan(rule="batch", sensitivity=sensitivity, threshold=threshold, nats_per_token=nats_per_token)
    gating: Any = SimpleNamespace(plan=plan, threshold=threshold)
    return BatchGate(gating, 16, CPU)


def number(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@settings(max_examples=40, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 1 << 20), top_k=st.integers(1, 5), tokens=st.integers(1, 6), dtype=st.booleans())
def test_drops_as_on_the_host(seed, top_k, tokens, dtype):
    """In any number of rounds; with padding, and pairs without an expert."""
    generator = torch.Generator().manual_seed(seed)
    experts = 8
    weights = torch.rand(tokens, top_k, generator=generator) + 0.01
    weights /= weights.sum(1, keepdim=True)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    resident = torch.rand(2, experts, generator=generator) < 0.4
    slots = torch.where(resident, torch.arange(experts), -1).int()
    slot_of = torch.cat((slots, torch.full((2, 1), -1, dtype=torch.int32)), 1)
    threshold = float(10 ** (2 * torch.rand((), generator=generator) - 2))
    rows = int(torch.randint(1, tokens + 1, (), generator=generator))
    ids[rows:] = torch.randint(-1, experts, (tokens - rows, top_k), generator=generator)
    expected = gate_batch(weights[:rows], ids[:rows], 0.5, threshold, resident[1])
    gate = gate_of(threshold, [9.0, 0.5])
    keep_mask, gated, cost = gate(1, weights, ids if dtype else ids.int(), number(rows), slot_of)
    assert keep_mask.dtype == torch.bool and keep_mask[:rows].tolist() == expected.keep_mask.tolist()
    assert not keep_mask[rows:].any()
    torch.testing.assert_close(gated[:rows], expected.weights, rtol=1e-6, atol=0)
    assert gated[:rows][expected.keep_mask.all(1)].equal(weights[:rows][expected.keep_mask.all(1)]), "to the last bit"
    assert cost[:rows].tolist() == pytest.approx(expected.cost.tolist(), rel=1e-9, abs=1e-15)
    assert not cost[rows:].any()


def test_rounds():
    """Prices change when a token loses an expert: two rounds, in the second of which nothing is cheap any more."""
    weights, ids = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([[0, 1, 2], [0, 1, 2]])
    slot_of = torch.full((1, 5), -1, dtype=torch.int32)
    for threshold, kept in ((0.05, [True, True, True]), (0.3, [True, True, False]), (2.0, [True, False, False])):
        keep_mask, _, _ = gate_of(threshold, [1.0])(0, weights, ids, number(2), slot_of)
        expected = gate_batch(weights, ids, 1.0, threshold, torch.zeros(4, dtype=torch.bool))
        assert keep_mask.tolist() == expected.keep_mask.tolist() == [kept, kept]


def test_what_is_not_a_number_is_kept():
    weights = torch.tensor([[float("nan"), 0.5], [0.9, 0.1]])
    ids, slot_of = torch.tensor([[0, 1], [2, 3]]), torch.full((1, 5), -1, dtype=torch.int32)
    keep_mask, gated, _ = gate_of(1.0, [1.0])(0, weights, ids, number(2), slot_of)
    assert keep_mask.tolist() == [[True, True], [True, False]]
    assert gated[0].isnan().tolist() == [True, False] and gated[1].tolist() == pytest.approx([1.0, 0.0])


def test_the_budget_is_spent_as_on_the_host():
    budget = LossBudget(0.01, 0.02)
    gate = gate_of(0.01, [1.0, 3.0], 0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        costs = torch.rand(2, 4, generator=generator, dtype=torch.float64) * (0.01 if step < 40 else 2.0)
        gate.end_step(costs)
        budget.spend(float(costs[0].sum() + 3 * costs[1].sum()), 4)
        assert gate.threshold.item() == pytest.approx(budget.threshold, rel=1e-12)
    assert gate.gating.threshold == 0.01, "of the host"
    gate.download()
    assert gate.gating.threshold == gate.threshold.item()
    gate.gating.threshold = 0.5
    gate.upload()
    assert gate.threshold.item() == 0.5
