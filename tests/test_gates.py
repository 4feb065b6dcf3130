"""Gating of all layers: what a step costs the loss budget."""

import math

import pytest

from vllm_adapmoe.gating.loss_budget import RATE
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.layers.gates import Gating


def gating() -> Gating:
    return Gating(GatingPlan(rule="batch", threshold=0.1, sensitivity=[1.0, 1.0], nats_per_token=0.01))


def test_a_step_that_verifies_spends_the_budget_of_its_rows():
    """Two requests of four rows each: a loss of eight tokens is within the budget of eight rows, not of two."""
    one = gating()
    one.layers[0].stats.loss_spent = 8 * 0.01
    one.end_step(rows=8, prompt_rows=0)
    assert one.threshold == pytest.approx(0.1)
    one.end_step(rows=8, prompt_rows=0)  # nothing lost
    assert one.threshold == pytest.approx(0.1 * math.exp(RATE))


def test_a_step_with_a_prompt_does_not():
    one = gating()
    one.end_step(rows=40, prompt_rows=33)
    assert one.threshold == 0.1
