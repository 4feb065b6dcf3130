"""Who leaves when a slot is wanted: pure policies over what layers have asked for.

A policy gives every expert of every layer a score; of those that may leave, the least leaves. It sees requests and
predictions, and never a tensor, a clock or a thread, so that the simulator and the worker run the same object.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np


class EvictionPolicy(ABC):
    """Scores for `[layers, experts]`."""

    def expect(self, layer: int, chances: np.ndarray) -> None:  # noqa: B027 - most policies look back only
        """The chance, `[experts]`, that the event of `layer` after the coming one uses each expert."""

    @abstractmethod
    def record(self, layer: int, experts: Sequence[int]) -> None:
        """One event: `layer` asks for these distinct experts at once."""

    @abstractmethod
    def scores(self) -> np.ndarray:
        """float64 `[layers, experts]`; the least leaves first. Only read until the next `record`."""


class LRU(EvictionPolicy):
    """Least recently used leaves first, over all layers."""

    def __init__(self, layers: int, experts: int) -> None:
        self.last = np.full((layers, experts), -1.0)
        self.events = 0

    def record(self, layer: int, experts: Sequence[int]) -> None:
        self.last[layer, experts] = self.events
        self.events += 1

    def scores(self) -> np.ndarray:
        return self.last


class LFRU(EvictionPolicy):
    """Frequency over age, `f / (age + 1)`: uses so far over events since the last of them."""

    def __init__(self, layers: int, experts: int) -> None:
        self.uses = np.zeros((layers, experts))
        self.last = np.full((layers, experts), -1.0)
        self.events = 0

    def record(self, layer: int, experts: Sequence[int]) -> None:
        self.uses[layer, experts] += 1
        self.last[layer, experts] = self.events
        self.events += 1

    def scores(self) -> np.ndarray:
        return self.uses / (self.events - self.last)


class MRS(EvictionPolicy):
    """Recent share of requests, an exponential mean by layer (HybriMoE's score, on requested experts)."""

    DECAY = 0.9

    def __init__(self, layers: int, experts: int) -> None:
        self.share = np.zeros((layers, experts))

    def record(self, layer: int, experts: Sequence[int]) -> None:
        self.share[layer] *= self.DECAY
        self.share[layer, experts] += 1 - self.DECAY

    def scores(self) -> np.ndarray:
        return self.share


class NextUse(EvictionPolicy):
    """The farthest expected next use leaves first: Belady's rule with estimates in place of the future.

    Layers come in turn, so the next event of layer j is `d = (j - l) mod L` events ahead of layer l's. An expert is
    used in an event of its layer with probability p, estimated by two exponential means of its uses, a quick and a
    slow one. The expected distance to its next use is `d + L (1 / p - 1)` (ours).
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
    """`NextUse` that also knows what the next tokens are expected to use (`heads.NextTokenHeads`).

    Half of an expert's chance is its recent use, half what the layer's head says of the coming tokens. The mean of
    the two was better than either in replays of both bundled models, and the share hardly matters (0.3 to 0.7).
    """

    SHARE = 0.5

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.expected: np.ndarray | None = None
        """Of the coming event."""

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
    "lfru": LFRU,
    "mrs": MRS,
    "next_use": NextUse,
    "next_token": NextToken,
}
