"""How many slots each layer deserves: expected loads by slots, and the split that makes their sum least."""

import heapq
from collections.abc import Sequence

import numpy as np


def expected_loads(
    num_experts: int, mean_experts: float, precision: Sequence[float] = (), max_experts: int = 1
) -> np.ndarray:
    """Demand loads of one layer in one step of one token, by the layer's slots; every expert is as likely as another.

    `E[D] = k (1 - s/N) - sum_j b_j sum_{u < min(p, j)} Hyp(u; N, x, j-1) (x - u) / (N - j + 1)`, with `x = N - s`
    absent experts, of which the j-th best predicted is one that speculation may still fetch when u of the better ones
    were absent too. Ours; with p = 1 and b_j = recall x share of tokens that keep j experts, it is the cost of the
    released code.

    Args:
        num_experts: N.
        mean_experts: k, experts that a token keeps, on average.
        precision: b_j, how often the j-th best predicted expert is used.
        max_experts: p, most experts that are fetched ahead.

    Returns:
        float64 `[num_experts + 1]`.
    """
    slots = np.arange(num_experts + 1)
    absent = num_experts - slots
    loads = mean_experts * (1 - slots / num_experts)
    for rank, share in enumerate(precision, start=1):
        for fetched in range(min(max_experts, rank)):
            here = np.maximum(absent - fetched, 0) / (num_experts - rank + 1)
            loads = loads - share * _hypergeometric(fetched, num_experts, absent, rank - 1) * here
    return np.maximum(loads, 0.0)


def _hypergeometric(hits: int, population: int, marked: np.ndarray, draws: int) -> np.ndarray:
    """Probability that `draws` of a population, without putting back, give `hits` of those marked."""
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
    """Loads of a layer with its own least-recently-used slots, for every number of slots, in one pass."""

    def __init__(self, num_experts: int, memory: float = float("inf")) -> None:
        self.order: list[int] = []
        """Experts, the most recently used first."""
        self.misses = np.zeros(num_experts + 1)
        """By slots."""
        self.keep = float(np.exp(-1 / memory))

    def record(self, experts: Sequence[int]) -> None:
        """One event: the layer asks for distinct experts together."""
        self.misses *= self.keep
        for expert in experts:
            rank = self.order.index(expert) if expert in self.order else len(self.misses) - 1
            self.misses[: rank + 1] += 1
        wanted = set(experts)
        self.order = [*experts, *(expert for expert in self.order if expert not in wanted)]


def is_convex(curve: np.ndarray) -> bool:
    """Whether each slot more saves no more than the one before."""
    return bool((np.diff(curve, 2) >= -1e-12).all())


def allocate(curves: Sequence[np.ndarray], slots: int) -> list[int]:
    """Shares of layers that add up to `slots` and make the sum of their expected loads least.

    Greedy, which is optimal, where every curve is convex; dynamic programming otherwise. A layer may get none. Where
    straight curves do not care, shares are as equal as can be.

    Args:
        curves: of each layer, expected loads with 0, 1, .. slots.
        slots: at most as many as all layers have experts.
    """
    assert slots <= sum(len(curve) - 1 for curve in curves)
    if all(map(is_convex, curves)):
        return _allocate_greedily(curves, slots)
    return _allocate_by_programme(curves, slots)


def _allocate_greedily(curves: Sequence[np.ndarray], slots: int) -> list[int]:
    shares = [0] * len(curves)
    # Rounded, or the last bits of a straight line would decide.
    gains = [(round(float(curve[1] - curve[0]), 12), 0, layer) for layer, curve in enumerate(curves) if len(curve) > 1]
    heapq.heapify(gains)
    for _ in range(slots):
        _, _, layer = heapq.heappop(gains)
        shares[layer] += 1
        curve, share = curves[layer], shares[layer]
        if share + 1 < len(curve):
            heapq.heappush(gains, (round(float(curve[share + 1] - curve[share]), 12), share, layer))
    return shares


def _allocate_by_programme(curves: Sequence[np.ndarray], slots: int) -> list[int]:
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
    shares, left = [], slots
    for choice in reversed(choices):
        shares.append(int(choice[left]))
        left -= shares[-1]
    return shares[::-1]


def share_out(curves: Sequence[np.ndarray] | None, num_experts: Sequence[int], slots: int) -> list[int]:
    """Shares of layers, floors in a pool of `slots`: by their curves, or, without any, as equal as can be."""
    slots = min(max(slots, 0), sum(num_experts))
    if curves is not None:
        return allocate(curves, slots)
    return allocate([-np.sqrt(np.arange(count + 1.0)) for count in num_experts], slots)
