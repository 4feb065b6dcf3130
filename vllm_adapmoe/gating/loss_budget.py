"""LossBudget: adapts the threshold of gating by batch to a loss budget."""

import torch

RATE = 0.02
"""Increase of the threshold's logarithm in a step without loss: it doubles in 35 steps."""


class LossBudget:
    """Controller that moves the threshold of gating by batch until the predicted loss of decoding meets the budget.

    Gating by batch drops only absent experts, and the price of a drop is summed over the tokens that share it. So at
    the threshold of gating by token it loses less than the budget: the better the cache, the less. The rest of the
    budget saves further fetches at a higher price. One threshold for all layers keeps the price of a fetch equal
    everywhere, which is where a budget saves most.

    Args:
        threshold: initial and minimum threshold: that of gating by token for the same budget, nats.
        nats_per_token: the budget: maximum loss per token, summed over layers, nats.
    """

    def __init__(self, threshold: float, nats_per_token: float) -> None:
        assert threshold > 0 and nats_per_token > 0
        self.min_threshold = threshold
        self.threshold = threshold
        self.nats_per_token = nats_per_token

    def spend(self, nats: float, tokens: int) -> float:
        """Records that a decode step of `tokens` tokens lost `nats`; returns the new threshold."""
        threshold, share = torch.tensor(
            [self.threshold, nats / tokens / self.nats_per_token], dtype=torch.float64
        ).unbind()
        self.threshold = next_threshold(threshold, share, self.min_threshold).item()
        return self.threshold


def next_threshold(threshold: torch.Tensor, spent_share: torch.Tensor, minimum: float) -> torch.Tensor:
    """Returns the threshold after a decode step, float64, as operations of one device.

    Args:
        threshold: threshold of the step, nats, float64.
        spent_share: what the step has lost, as a share of its budget, float64.
        minimum: minimum threshold, nats.
    """
    return (threshold * (RATE * (1 - spent_share)).clamp(min=-1.0).exp()).clamp(min=minimum)
