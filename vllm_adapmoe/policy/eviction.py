"""Eviction policies: which resident expert to evict when a slot is needed.

A policy scores every expert of every layer; the evictable expert with the lowest score is evicted. It sees requests
and predictions, never a tensor, clock or thread, so that the simulator and the worker run the same object.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np


class EvictionPolicy(ABC):
    """An eviction policy: scores experts by the requests recorded so far."""

    def expect(self, layer: int, chances: np.ndarray) -> None:  # noqa: B027 - most policies need no predictions
        """Sets the predicted chance, `[experts]`, that the event of `layer` after the coming one uses each expert."""

    @abstractmethod
    def record(self, layer: int, experts: Sequence[int]) -> None:
        """Records one event: `layer` requests these distinct experts together."""

    @abstractmethod
    def scores(self) -> np.ndarray:
        """Returns float64 `[layers, experts]`, valid until the next `record`; the lowest score is evicted first."""


class LRU(EvictionPolicy):
    """Evicts the least recently used expert of all layers."""

    def __init__(self, layers: int, experts: int) -> None:
        self.last = np.full((layers, experts), -1.0)
        self.events = 0

    def record(self, layer: int, experts: Sequence[int]) -> None:
        self.last[layer, experts] = self.events
        self.events += 1

    def scores(self) -> np.ndarray:
        return self.last


class NextUse(EvictionPolicy):
    """Evicts the expert whose expected next use is farthest: Belady's rule with estimates in place of the future.

    Layers run in turn, so the next event of layer j is `d = (j - l) mod L` events after layer l's. An expert is used in
    an event of its layer with probability p, estimated by two exponential means of its uses, a fast and a slow one. The
    expected distance to its next use is `d + L (1 / p - 1)` (ours).
    """

    QUICK, SLOW = 0.5, 0.05
    WEIGHT = 0.15
    FLOOR = 0.01

    def __init__(self, layers: int, experts: int) -> None:
        self.quick = np.zeros((layers, experts))
        self.slow = np.zeros((layers, experts))
        self.chance = np.zeros((layers, experts))
        self.layers = np.arange(layers)
        self.layer = 0

    def record(self, layer: int, experts: Sequence[int]) -> None:
        self.layer = layer
        for mean, rate in ((self.quick, self.QUICK), (self.slow, self.SLOW)):
            mean[layer] *= 1 - rate
            mean[layer, experts] += rate
        self.chance[layer] = self.FLOOR + (1 - self.FLOOR) * (
            self.WEIGHT * self.quick[layer] + (1 - self.WEIGHT) * self.slow[layer]
        )

    def scores(self) -> np.ndarray:
        count = len(self.layers)
        distance = (self.layers - self.layer - 1) % count + 1.0
        return -(distance[:, None] + count * (1 / np.maximum(self.chance, self.FLOOR) - 1))


class NextToken(NextUse):
    """Evicts like `NextUse`, with the next tokens' predicted experts included in p (`heads.NextTokenHeads`).

    p is the mean of the estimate from recent use and the prediction of the layer's next-token head. The mean was better
    than either in replays of both bundled models, and the share hardly matters (0.3 to 0.7).
    """

    SHARE = 0.5

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.expected: np.ndarray | None = None
        """Chances to mix in at the coming event, `[experts]`."""

    def expect(self, layer: int, chances: np.ndarray) -> None:
        self.expected = chances

    def record(self, layer: int, experts: Sequence[int]) -> None:
        super().record(layer, experts)
        if self.expected is not None:
            chance = self.chance[layer, : len(self.expected)]
            chance += self.SHARE * (self.expected - chance)
            self.expected = None


POLICIES: dict[str, Callable[[int, int], EvictionPolicy]] = {
    "lru": LRU,
    "next_use": NextUse,
    "next_token": NextToken,
}
