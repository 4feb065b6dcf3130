"""LossBudget: spends what gating by batch may lose, and no more."""

import math

RATE = 0.02
"""That the logarithm of the threshold rises in a step that loses nothing: it doubles in 35 steps."""


class LossBudget:
    """Moves the threshold of gating by batch until decoding loses, as predicted, what it may lose.

    By batch only what is absent is dropped, and a drop is paid for by all tokens that share it. So at the threshold of
    gating by token, less than the budget is lost: the better the cache, the less. What is left over saves further
    fetches at a higher price. One threshold for all layers keeps the price of a fetch the same everywhere, which is
    where a budget saves most.

    Args:
        threshold: to begin with, and the least: that of gating by token for the same budget, nats.
        nats_per_token: the budget, the sum over layers of what a token may lose.
    """

    def __init__(self, threshold: float, nats_per_token: float) -> None:
        assert threshold > 0 and nats_per_token > 0
        self.least = threshold
        self.threshold = threshold
        self.nats_per_token = nats_per_token

    def spend(self, nats: float, tokens: int) -> float:
        """One decode step has lost `nats` with `tokens` tokens; returns the threshold from here on."""
        left = 1 - nats / tokens / self.nats_per_token
        self.threshold = max(self.least, self.threshold * math.exp(max(-1.0, RATE * left)))
        return self.threshold
