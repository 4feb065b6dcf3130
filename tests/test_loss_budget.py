"""A budget is spent in the long run, whatever the cache makes of a threshold."""

import numpy as np
import pytest

from vllm_adapmoe.gating.loss_budget import RATE, LossBudget


@pytest.mark.parametrize("absent", [0.05, 0.3, 1.0])
def test_in_the_long_run_the_budget_is_spent(absent):
    """Costs of dropping are spread over orders of magnitude; a share of what could be dropped is absent."""
    generator = np.random.default_rng(0)
    budget = LossBudget(threshold=1e-3, nats_per_token=0.01)
    spent = []
    for _ in range(6000):
        prices = 10 ** generator.uniform(-6, 0, size=12)
        drops = (prices < budget.threshold) & (generator.random(12) < absent)
        spent.append(float(prices[drops].sum()))
        budget.spend(spent[-1], 1)
    assert np.mean(spent[1500:]) == pytest.approx(0.01, rel=0.1)


def test_never_below_gating_by_token():
    budget = LossBudget(threshold=0.5, nats_per_token=0.01)
    for _ in range(100):
        assert budget.spend(1.0, 1) == 0.5


def test_moves_slowly():
    budget = LossBudget(threshold=1.0, nats_per_token=1.0)
    assert budget.spend(0.0, 4) == pytest.approx(np.exp(RATE))
    assert budget.spend(4.0, 4) == pytest.approx(np.exp(RATE)), "just what it may lose"
    assert budget.spend(4000.0, 4) == 1.0
