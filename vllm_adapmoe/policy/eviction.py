"""Eviction policies: which resident expert to evict when a slot is needed.

A policy estimates how long each expert will not be used; the evictable expert with the longest wait is evicted. It sees
requests and predictions, never a tensor, clock or thread, so that the simulator and the worker run the same object. The
worker's own policies count in whole numbers, so that a GPU that decides by itself evicts the same experts
(`expected_wait`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy import expected_wait
from vllm_adapmoe.policy.compiled import compiled
from vllm_adapmoe.policy.expected_wait import EVENT, UNIT, fixed
from vllm_adapmoe.policy.gpu_state import GpuState
from vllm_adapmoe.policy.prefetch_planner import MIN_CHANCE

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

    def __init__(self, layers: int, experts: int, dtype: type = np.int64) -> None:
        self.wait: np.ndarray = np.zeros((layers, experts), dtype)
        """`[layers, experts]`."""
        self.distance: np.ndarray = np.zeros(layers, dtype)
        """`[layers]`."""

    @abstractmethod
    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        """Records one event.

        Args:
            layer: MoE layer index.
            experts: distinct experts that the layer requests together, int64.
            expected: predicted chance that the layer's next event uses each expert, float `[experts]`; most policies
                need no predictions.
        """

    def adopt(self, state: GpuState) -> None:
        """Takes over from a GPU that has recorded events meanwhile."""
        self.wait[:] = state.wait

    @property
    def ahead_limit(self) -> float:
        """Minimum wait of an expert that is evicted for a prefetch of the next layer: that of the prefetched one."""
        raise NotImplementedError(f"{type(self).__name__} is not run on a GPU")

    def wait_of(self, key: ExpertKey) -> float:
        """Returns the wait of one expert."""
        return float(self.wait[key] + self.distance[key[0]])


class LRU(EvictionPolicy):
    """Evicts the least recently used expert of all layers."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.wait.fill(1)
        self.events = 0
        """Events so far."""

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self.wait[layer, experts] = -self.events
        self.events += 1

    def adopt(self, state: GpuState) -> None:
        super().adopt(state)
        self.events = state.events

    @property
    def ahead_limit(self) -> int:
        return len(self.wait) - self.events  # not used for a whole step


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
        self.quick = np.zeros((layers, experts), np.int64)
        """Fast mean of uses, int64 `[layers, experts]`, in units of 1 / `UNIT`."""
        self.slow = np.zeros((layers, experts), np.int64)
        """Slow mean of uses, likewise."""
        self.rates = fixed(self.QUICK), fixed(self.SLOW), fixed(self.WEIGHT), fixed(self.FLOOR)
        """The constants, in units of 1 / `UNIT`."""
        self.wait.fill(expected_wait.expected_wait(self.rates[-1], layers, EVENT, UNIT))
        self._distances = ((np.arange(layers) - np.arange(layers)[:, None] - 1) % layers + 1) * EVENT
        """Distance of each layer's next event after an event of another: `[layer of the event, layer]`."""
        self.distance = self._distances[0]

    @property
    def share(self) -> int:
        """Weight of a prediction in p, in units of 1 / `UNIT`."""
        return 0

    @property
    def ahead_limit(self) -> int:
        return EVENT + expected_wait.expected_wait(fixed(MIN_CHANCE), len(self.wait), EVENT, UNIT)

    def adopt(self, state: GpuState) -> None:
        super().adopt(state)
        self.quick[:], self.slow[:] = state.quick, state.slow
        self.distance = self._distances[state.last_layer]

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self._record(layer, experts, NO_CHANCES)

    def _record(self, layer: int, experts: np.ndarray, expected: np.ndarray) -> None:
        self.distance = self._distances[layer]
        _record_uses(
            self.wait[layer], self.quick[layer], self.slow[layer], experts, expected, len(self.wait), *self.rates,
            self.share, EVENT, UNIT,
        )  # fmt: skip


class NextToken(NextUse):
    """Evicts like `NextUse`, with the next tokens' predicted experts included in p (`heads.NextTokenHeads`).

    p is the mean of the estimate from recent use and the prediction of the layer's next-token head. The mean was better
    than either in replays of both bundled models, and the share hardly matters: with 128 experts, 0.3 moves 1 to 3 %
    more bytes and 0.7 up to 2 % less (examples/benchmarks/eviction_constants_tiny_qwen3moe.json).
    """

    SHARE = 0.5

    @property
    def share(self) -> int:
        return fixed(self.SHARE)

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None = None) -> None:
        self._record(layer, experts, NO_CHANCES if expected is None else expected.astype(np.float32, copy=False))


_next_rate, _use_chance = compiled(expected_wait.next_rate), compiled(expected_wait.use_chance)
_mixed_chance, _expected_wait = compiled(expected_wait.mixed_chance), compiled(expected_wait.expected_wait)


@compiled
def _record_uses(
    wait: np.ndarray,
    quick: np.ndarray,
    slow: np.ndarray,
    experts: np.ndarray,
    expected: np.ndarray,
    layers: int,
    quick_rate: int,
    slow_rate: int,
    weight: int,
    floor: int,
    share: int,
    event: int,
    unit: int,
) -> None:
    """Updates one layer's means of uses and its waits, all `[experts]`, by an event; see `NextUse` and `NextToken`."""
    used = np.zeros(len(wait), np.int64)
    for expert in experts:
        used[expert] = 1
    for expert in range(len(wait)):
        quick[expert] = _next_rate(quick[expert], used[expert], quick_rate, unit)
        slow[expert] = _next_rate(slow[expert], used[expert], slow_rate, unit)
        chance = _use_chance(quick[expert], slow[expert], weight, floor, unit)
        if expert < len(expected):
            chance = max(_mixed_chance(chance, int(expected[expert] * unit), share, unit), floor)
        wait[expert] = _expected_wait(chance, layers, event, unit)


POLICIES: dict[str, Callable[[int, int], EvictionPolicy]] = {
    "lru": LRU,
    "next_use": NextUse,
    "next_token": NextToken,
}
