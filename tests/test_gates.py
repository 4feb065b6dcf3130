"""Gating of all layers: what a step costs the loss budget."""

import math

import pytest
import torch

from vllm_adapmoe.gating.loss_budget import RATE
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.layers.gates import Gating


def gating() -> Gating:
    return Gating(GatingPlan(rule="batch", threshold=0.1, sensitivity=[1.0, 1.0], nats_per_token=0.01))


def test_a_step_that_verifies_spends_the_budget_of_its_rows():
    """Two requests of four rows each: a loss of eight tokens is within the budget of eight rows, not of two."""
    one = gating()
    one.layers[0].count(torch.ones(8, 2, dtype=torch.bool), torch.full((8,), 0.01, dtype=torch.float64), None)
    one.end_step(rows=8, prompt_rows=0)
    assert one.threshold == pytest.approx(0.1)
    one.end_step(rows=8, prompt_rows=0)  # nothing lost
    assert one.threshold == pytest.approx(0.1 * math.exp(RATE))


def test_a_step_with_a_prompt_does_not():
    one = gating()
    one.end_step(rows=40, prompt_rows=33)
    assert one.threshold == 0.1


def test_what_the_gpu_counts_later_is_not_spent_again():
    one = gating()
    one.layers[1].count_finished(torch.ones(8, 2, dtype=torch.bool), torch.full((8,), 0.05, dtype=torch.float64))
    assert one.layers[1].stats.loss_spent == pytest.approx(0.4)
    one.end_step(rows=8, prompt_rows=0)
    assert one.threshold == pytest.approx(0.1 * math.exp(RATE)), "the host's own step has lost nothing"


def test_padding_has_no_part_in_prices():
    """Two rows of padding ask for the absent expert; the one token drops it as if it were alone."""
    weights = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])
    ids, resident = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([True, False])
    real = torch.tensor([True, False, False])
    gated = gating().layers[0].gate_together(weights, ids, resident, real)
    assert gated.keep_mask.tolist() == [[True, False], [False, False], [False, False]]
    assert gated.cost.tolist() == pytest.approx([0.01, 0, 0])
