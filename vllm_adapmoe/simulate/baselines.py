"""Eviction policies that only `adapmoe simulate` runs: proposed elsewhere, to compare the worker's policies with.

Both lose to `next_use`, which needs no more than they do, in every replay of docs/benchmarks.md: two models, batches of
1 and 8, and 25, 50 and 75 % of the experts resident (examples/benchmarks/simulate_*.json).
"""

from collections.abc import Callable

import numpy as np

from vllm_adapmoe.policy.eviction import POLICIES, EvictionPolicy


class LFRU(EvictionPolicy):
    """Evicts by frequency over age, `f / (age + 1)`: uses so far over events since the last use."""

    ages = True

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts, np.float64)
        self.uses = np.zeros((layers, experts))
        self.last = np.full((layers, experts), -1.0)
        self.events = 0

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self.uses[layer, experts] += 1
        self.last[layer, experts] = self.events
        self.events += 1
        self.wait = -self.uses / (self.events - self.last)


class MRS(EvictionPolicy):
    """Evicts by recent share of requests, an exponential mean per layer (HybriMoE's score, on requested experts)."""

    DECAY = 0.9

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts, np.float64)

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self.wait[layer] *= self.DECAY
        self.wait[layer, experts] -= 1 - self.DECAY


SIMULATED: dict[str, Callable[[int, int], EvictionPolicy]] = {**POLICIES, "lfru": LFRU, "mrs": MRS}
"""The policies that can be replayed, by name: the worker's own, and those above."""
