"""Statistics of a worker's expert cache and gates: totals since the start, and increments of every step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.gates import GateStats, Gating
from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.scheduling.counters import StepCounters, over_ranks


def total_stats(
    cache: ExpertCacheManager | None, layers: Sequence[CachedExperts], gating: Gating | None
) -> dict[str, float]:
    """Returns this rank's counters since the start, and the numbers of slots and of filled slots.

    Empty if every expert fits and nothing is gated.
    """
    if cache is None and gating is None:
        return {}
    stats = CacheStats() if cache is None else cache.update_stats()
    gates = [] if gating is None else [gate.stats for gate in gating.layers]
    gated = {name: sum(vars(gate)[name] for gate in gates) for name in vars(GateStats())}
    return vars(stats) | {"demand_loads": stats.demand_loads} | _slots(cache, layers) | gated


def _slots(cache: ExpertCacheManager | None, layers: Sequence[CachedExperts]) -> dict[str, float]:
    if cache is not None:
        return {"slots": cache.num_slots, "resident": cache.num_resident}
    experts = sum(layer.local_num_experts for layer in layers)
    return {"slots": experts, "resident": experts}


class CounterDelta:
    """Computes increments of counters between calls; starts from zero when their owner is another object."""

    def __init__(self) -> None:
        self._owner: object = None
        self._before: np.ndarray | None = None

    def __call__(self, owner: object, now: Sequence[float] | np.ndarray) -> np.ndarray:
        counted = np.array(now, dtype=np.float64)
        change = counted - self._before if owner is self._owner and self._before is not None else counted
        self._owner, self._before = owner, counted
        return change


class StepStats:
    """Computes the increments of the counters per step.

    With several ranks, each holds and fetches its own shard of every expert: shards, slots, bytes and fetch time are
    summed over the ranks, while the waiting time is the maximum, as other ranks wait for the slowest. The numbers are
    gathered while the next step runs, and so reported with it.

    Args:
        cache: this rank's cache; None if every expert is resident.
        layers: the model's MoE layers.
        group: host process group of the ranks; None for a single rank.
    """

    def __init__(
        self, cache: ExpertCacheManager | None, layers: Sequence[CachedExperts], group: dist.ProcessGroup | None
    ) -> None:
        self.cache = cache
        self.layers = layers
        self.group = group
        self._fetched, self._gated = CounterDelta(), CounterDelta()
        self._gathered: tuple[Any, list[torch.Tensor]] | None = None

    def step(self, gating: Gating | None) -> StepCounters | None:
        """Returns the increments since the last call, or None. Collective: all ranks must call it equally often."""
        counters = None
        if self.cache is not None:
            counters = self._of_cache(self.cache)
            counters = counters if self.group is None else self._of_all_ranks(counters, self.group)
        if gating is not None:
            gated = self._of_gates(gating)
            slots: dict[str, Any] = _slots(None, self.layers)
            rest = StepCounters(**slots) if self.cache is None else counters
            counters = gated if rest is None else replace(rest, **gated.counted())
        return counters

    def _of_cache(self, cache: ExpertCacheManager) -> StepCounters:
        controller, stats = cache.controller, cache.update_stats()
        counted: dict[str, Any] = vars(stats) | {"demand_loads": stats.demand_loads}
        now = [*counted.values(), *controller.layer_hits, *controller.layer_misses]
        change = self._fetched(controller, now).tolist()
        totals, layers = len(counted), len(controller.layer_hits)
        return StepCounters(
            **dict(zip(counted, change[:totals], strict=True)),
            layer_hits=change[totals : totals + layers],
            layer_misses=change[totals + layers :],
            slots=cache.num_slots,
            resident=cache.num_resident,
            layer_resident=controller.layer_residents(),
            layer_experts=controller.num_local,
            layer_floors=controller.layer_floors() or None,
        )

    def _of_all_ranks(self, counters: StepCounters, group: dist.ProcessGroup) -> StepCounters | None:
        before, tensor = self._gathered, torch.from_numpy(counters.to_vector())
        ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        self._gathered = dist.all_gather(ranks, tensor, group=group, async_op=True), ranks
        if before is None:
            return None
        before[0].wait()
        return over_ranks([counters.with_vector(rank.numpy()) for rank in before[1]])

    def _of_gates(self, gating: Gating) -> StepCounters:
        """Returns the gates' increments on this rank alone, as all ranks gate the same tokens."""
        stats = [gate.stats for gate in gating.layers]
        now = StepCounters(
            layer_gated_tokens=[layer.gated_tokens for layer in stats],
            layer_kept_experts=[layer.kept_experts for layer in stats],
            loss_spent=sum(layer.loss_spent for layer in stats),
        )
        change = now.with_vector(self._gated(gating, now.to_vector()))
        return replace(
            change, gated_tokens=sum(change.layer_gated_tokens or ()), kept_experts=sum(change.layer_kept_experts or ())
        )
