"""Eviction policies: which resident expert to evict when a slot is needed.

A policy estimates how long each expert will not be used; the evictable expert with the longest wait is evicted. It sees
requests and predictions, never a tensor, clock or thread, so that the simulator and the worker run the same object.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.compiled import compiled

NO_CHANCES = np.empty(0, dtype=np.float32)


class EvictionPolicy(ABC):
    """An eviction policy: estimates every expert's wait from the requests recorded so far.

    The wait of an expert is `wait[layer, expert] + distance[layer]`. An event changes one row of `wait` alone (all rows
    if `ages`), so that a victim is found without a pass over all experts of all layers.

    Args:
        layers: number of MoE layers.
        experts: number of experts of a layer, the maximum where layers differ.
    """

    ages = False
    """Whether every event changes the waits of all layers."""

    def __init__(self, layers: int, experts: int) -> None:
        self.wait = np.zeros((layers, experts))
        """Float64 `[layers, experts]`."""
        self.distance = np.zeros(layers)
        """Float64 `[layers]`."""

    @abstractmethod
    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        """Records one event.

        Args:
            layer: MoE layer index.
            experts: distinct experts that the layer requests together, int64.
            expected: predicted chance that the layer's next event uses each expert, float `[experts]`; most policies
                need no predictions.
        """

    def wait_of(self, key: ExpertKey) -> float:
        """Returns the wait of one expert."""
        return float(self.wait[key] + self.distance[key[0]])


class LRU(EvictionPolicy):
    """Evicts the least recently used expert of all layers."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.wait.fill(1.0)
        self.events = 0

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self.wait[layer, experts] = -self.events
        self.events += 1


class NextUse(EvictionPolicy):
    """Evicts the expert whose expected next use is farthest: Belady's rule with estimates in place of the future.

    Layers run in turn, so the next event of layer j is `d = (j - l) mod L` events after layer l's. An expert is used in
    an event of its layer with probability p, estimated by two exponential means of its uses, a fast and a slow one. The
    expected distance to its next use is `d + L (1 / p - 1)` (ours).

    The constants hardly matter: with 128 experts, half or twice the slow rate and none or twice the weight of the fast
    mean move 0.95 to 1.07 times the bytes (examples/benchmarks/eviction_constants_tiny_qwen3moe.json).
    """

    QUICK, SLOW = 0.5, 0.05
    WEIGHT = 0.15
    FLOOR = 0.01

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.quick = np.zeros((layers, experts))
        self.slow = np.zeros((layers, experts))
        self.wait.fill(layers * (1 / self.FLOOR - 1))
        self._distances = (np.arange(layers) - np.arange(layers)[:, None] - 1) % layers + 1.0
        """Distance of each layer's next event after an event of another: `[layer of the event, layer]`."""
        self.distance = self._distances[0]

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self._record(layer, experts, NO_CHANCES, 0.0)

    def _record(self, layer: int, experts: np.ndarray, expected: np.ndarray, share: float) -> None:
        self.distance = self._distances[layer]
        _record_uses(
            self.wait[layer], self.quick[layer], self.slow[layer], experts, len(self.wait),
            self.QUICK, self.SLOW, self.WEIGHT, self.FLOOR, expected, share,
        )  # fmt: skip


class NextToken(NextUse):
    """Evicts like `NextUse`, with the next tokens' predicted experts included in p (`heads.NextTokenHeads`).

    p is the mean of the estimate from recent use and the prediction of the layer's next-token head. The mean was better
    than either in replays of both bundled models, and the share hardly matters: with 128 experts, 0.3 moves 1 to 3 %
    more bytes and 0.7 up to 2 % less (examples/benchmarks/eviction_constants_tiny_qwen3moe.json).
    """

    SHARE = 0.5

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        chances = NO_CHANCES if expected is None else expected.astype(np.float32, copy=False)
        self._record(layer, experts, chances, self.SHARE)


@compiled
def _record_uses(
    wait: np.ndarray,
    quick: np.ndarray,
    slow: np.ndarray,
    experts: np.ndarray,
    layers: int,
    quick_rate: float,
    slow_rate: float,
    weight: float,
    floor: float,
    expected: np.ndarray,
    share: float,
) -> None:
    """Updates one layer's means of uses and its waits, all `[experts]`, by an event; see `NextUse` and `NextToken`."""
    quick *= 1 - quick_rate
    slow *= 1 - slow_rate
    for expert in experts:
        quick[expert] += quick_rate
        slow[expert] += slow_rate
    for expert in range(len(wait)):
        chance = floor + (1 - floor) * (weight * quick[expert] + (1 - weight) * slow[expert])
        if expert < len(expected):
            chance += share * (expected[expert] - chance)
        wait[expert] = layers * (1 / max(chance, floor) - 1)


POLICIES: dict[str, Callable[[int, int], EvictionPolicy]] = {
    "lru": LRU,
    "next_use": NextUse,
    "next_token": NextToken,
}
