"""Splits slots among layers so that the sum of their expected loads is minimal."""

import heapq
from collections.abc import Sequence

import numpy as np


def expected_loads(
    num_experts: int, mean_experts: float, precision: Sequence[float] = (), max_experts: int = 1
) -> np.ndarray:
    """Returns the expected demand loads of one layer per one-token step, by its slots, with all experts equally likely.

    `E[D] = k (1 - s/N) - sum_j b_j sum_{u < min(p, j)} Hyp(u; N, x, j-1) (x - u) / (N - j + 1)`, with `x = N - s`
    absent experts: the j-th best predicted one can still be prefetched when u < p of the better ones were absent too.
    Ours; with p = 1 and b_j = recall x share of tokens that keep j experts, it is the cost of the released code.

    Args:
        num_experts: N.
        mean_experts: k, mean experts that a token keeps.
        precision: b_j, how often the j-th best predicted expert is used.
        max_experts: p, maximum number of experts prefetched.

    Returns:
        float64 `[num_experts + 1]`, for s = 0, 1, .. N slots.
    """
    slots = np.arange(num_experts + 1)
    absent = num_experts - slots
    loads = mean_experts * (1 - slots / num_experts)
    for rank, share in enumerate(precision, start=1):
        for fetched in range(min(max_experts, rank)):
            also_absent = np.maximum(absent - fetched, 0) / (num_experts - rank + 1)
            loads = loads - share * _hypergeometric(fetched, num_experts, absent, rank - 1) * also_absent
    return np.maximum(loads, 0.0)


def _hypergeometric(hits: int, population: int, marked: np.ndarray, draws: int) -> np.ndarray:
    """Returns the chance that `draws` from a population without replacement contain `hits` marked ones."""
    chance = np.zeros(len(marked))
    for index, count in enumerate(marked.tolist()):
        if max(0, draws - (population - count)) <= hits <= min(draws, count):
            chance[index] = _choose(count, hits) * _choose(population - count, draws - hits)
    return chance / _choose(population, draws)


def _choose(n: int, k: int) -> float:
    result = 1.0
    for i in range(k):
        result *= (n - i) / (i + 1)
    return result


class StackDistances:
    """LRU stack distances: counts a layer's misses for every number of LRU slots of its own, in one pass."""

    def __init__(self, num_experts: int, memory: float = float("inf")) -> None:
        self.order: list[int] = []
        """Experts, most recently used first."""
        self.misses = np.zeros(num_experts + 1)
        """Misses with 0, 1, .. slots."""
        self.decay = float(np.exp(-1 / memory))

    def record(self, experts: Sequence[int]) -> None:
        """Records one event, a request for distinct experts."""
        self.misses *= self.decay
        for expert in experts:
            rank = self.order.index(expert) if expert in self.order else len(self.misses) - 1
            self.misses[: rank + 1] += 1
        requested = set(experts)
        self.order = [*experts, *(expert for expert in self.order if expert not in requested)]


def is_convex(curve: np.ndarray) -> bool:
    """Returns whether each additional slot saves no more than the one before."""
    return bool((np.diff(curve, 2) >= -1e-12).all())


def allocate(curves: Sequence[np.ndarray], slots: int) -> list[int]:
    """Returns the slots of each layer, adding up to `slots`, that minimise the sum of their expected loads.

    Greedy, which is optimal, where every curve is convex; dynamic programming otherwise. A layer may get no slot.
    Ties of straight curves are broken towards equal shares.

    Args:
        curves: expected loads of each layer with 0, 1, .. slots.
        slots: at most the number of experts of all layers.
    """
    assert slots <= sum(len(curve) - 1 for curve in curves)
    if all(map(is_convex, curves)):
        return _allocate_greedily(curves, slots)
    return _allocate_by_dynamic_programming(curves, slots)


def _allocate_greedily(curves: Sequence[np.ndarray], slots: int) -> list[int]:
    shares = [0] * len(curves)
    # Rounded, so that rounding errors in a straight line do not break ties.
    gains = [(round(float(curve[1] - curve[0]), 12), 0, layer) for layer, curve in enumerate(curves) if len(curve) > 1]
    heapq.heapify(gains)
    for _ in range(slots):
        _, _, layer = heapq.heappop(gains)
        shares[layer] += 1
        curve, share = curves[layer], shares[layer]
        if share + 1 < len(curve):
            heapq.heappush(gains, (round(float(curve[share + 1] - curve[share]), 12), share, layer))
    return shares


def _allocate_by_dynamic_programming(curves: Sequence[np.ndarray], slots: int) -> list[int]:
    best = np.zeros(1)
    choices = []
    for curve in curves:
        reach = min(len(best) - 1 + len(curve) - 1, slots)
        following = np.full(reach + 1, np.inf)
        choice = np.zeros(reach + 1, dtype=np.int32)
        for share, loads in enumerate(curve.tolist()):
            end = min(share + len(best), reach + 1)
            if end <= share:
                break
            candidate = best[: end - share] + loads
            better = candidate < following[share:end]
            following[share:end][better] = candidate[better]
            choice[share:end][better] = share
        best = following
        choices.append(choice)
    shares, remaining = [], slots
    for choice in reversed(choices):
        shares.append(int(choice[remaining]))
        remaining -= shares[-1]
    return shares[::-1]


def allocate_floors(curves: Sequence[np.ndarray] | None, num_experts: Sequence[int], slots: int) -> list[int]:
    """Returns each layer's floor in a pool of `slots`: by the curves, or as equal as possible without curves."""
    slots = min(max(slots, 0), sum(num_experts))
    if curves is not None:
        return allocate(curves, slots)
    return allocate([-np.sqrt(np.arange(count + 1.0)) for count in num_experts], slots)
