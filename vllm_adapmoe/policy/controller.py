"""What an expert cache decides, event by event: the same object in a worker and in the simulator."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from vllm_adapmoe.experts import CacheShape, ExpertKey
from vllm_adapmoe.policy.allocation import StackDistances, share_out
from vllm_adapmoe.policy.eviction import POLICIES, EvictionPolicy
from vllm_adapmoe.policy.prefetch_planner import PredictExperts, PrefetchPlanner, RequestPrefetch
from vllm_adapmoe.policy.residency import Load, Request, Residency, State

if TYPE_CHECKING:  # a cache runs with torch and numpy alone
    from vllm_adapmoe.config import AdapMoEConfig

MEMORY = 1024.0
"""Events of a layer after which its stack distances have faded to 1/e."""
CATCH_UP = 0.25
"""Of the experts that a step has read in place, the share that is loaded after it at most."""
REVISION_STEPS = 256
"""Steps between two revisions of floors that follow the traffic."""


@dataclass
class CacheStats:
    """Counted over distinct experts of every layer's event, since the engine started."""

    hits: int = 0
    """Experts that were there when they were asked for."""
    misses: int = 0
    """Experts that had to be waited for: loaded on demand, or late."""
    late: int = 0
    """Of the misses, those that were on their way, though nobody had asked for them."""
    in_place: int = 0
    """Of the misses, those that the kernel read where they were: nobody waited for them."""
    caught_up: int = 0
    """Of those, the ones that were then loaded, in the place of an expert wanted less."""
    prefetches: int = 0
    """Speculative loads begun."""
    prefetch_hits: int = 0
    """Of the hits, those that speculation had loaded for this event or an earlier one."""
    prefetches_wasted: int = 0
    """Of the speculative loads, those whose expert came, and left without being asked for."""
    prefetches_cancelled: int = 0
    """Of the speculative loads, those that the router's word stopped on their way."""
    fetched_bytes: int = 0
    """Bytes moved, on demand or not."""
    wasted_bytes: int = 0
    """Of those, bytes of speculative loads that were cancelled, or whose expert left without being asked for."""
    stall_seconds: float = 0.0
    """That layers waited."""
    fetch_seconds: float = 0.0
    """With at least one transfer under way: `fetched_bytes` over it is the bandwidth achieved."""

    @property
    def demand_loads(self) -> int:
        """Experts that were loaded because a layer asked for them."""
        return self.misses - self.late - self.in_place


@dataclass(frozen=True)
class CacheSetup:
    """The user's side of a cache."""

    slots: Sequence[int]
    """Of each pool."""
    eviction: str = "lru"
    allocation: str = "pool"
    """`pool`: no layer has a claim to slots. Floors in the pool otherwise: `uniform`, the same for all; `profile`, by
    `curves`; `trace`, by the traffic so far, revised as it goes on."""
    curves: Sequence[Sequence[float]] | None = None
    """Of each layer, expected loads with 0, 1, .. slots; for `profile`."""
    lookahead: int = 0
    """Layers to look ahead at most; 0: nothing is fetched ahead."""
    max_experts: int = 0
    """Most that speculation may have under way, and, where there are enough slots, staging slots of each pool."""

    @classmethod
    def of(
        cls,
        config: "AdapMoEConfig",
        slots: Sequence[int],
        curves: Sequence[Sequence[float]] | None,
        heads: bool = False,
    ) -> Self:
        """What a configuration asks of a cache with pools of `slots`; `heads`: there are next-token heads."""
        prefetch = config.prefetch
        best = "next_token" if heads else "next_use"
        eviction = best if config.eviction == "auto" else config.eviction
        return cls(slots, eviction, config.allocation, curves, prefetch.lookahead, prefetch.max_experts)

    def staging(self, slots: int, num_experts: int) -> int:
        """Staging slots of a pool of `slots` for layers of `num_experts`.

        No more than an eighth, and only what is beyond one whole layer: with less, steps would run in more waves.
        """
        return max(0, min(self.max_experts, slots // 8, slots - num_experts)) if self.lookahead else 0


class Transfers(Protocol):
    """Moves experts. Demand goes first, each kind in the order of submission."""

    def demand(self, load: Load) -> None:
        """Loads an expert that a layer waits for."""

    def promote(self, key: ExpertKey) -> None:
        """A layer waits now for what speculation is loading."""

    def speculate(self, key: ExpertKey) -> None:
        """Loads a queued expert when nothing else is to do: `start_speculation`, then `transfer_ended`."""


class CacheController:
    """Residency of every pool, what is fetched ahead, and the counters.

    Args:
        shape: the model's experts.
        setup: slots and policies.
        eviction: makes the policy of a pool from layers and experts; None: what the setup names.
    """

    def __init__(
        self, shape: CacheShape, setup: CacheSetup, eviction: Callable[[int, int], EvictionPolicy] | None = None
    ) -> None:
        self.shape, self.setup = shape, setup
        self.pool_of = list(shape.pool_of)
        self.expert_bytes = list(shape.expert_bytes)
        held = [range(count) for count in shape.num_experts] if shape.held is None else shape.held
        self.held = np.zeros((len(held), max(shape.num_experts)), dtype=bool)
        """`[layers, experts]`: who can be here at all."""
        for row, its in zip(self.held, held, strict=True):
            row[list(its)] = True
        self.num_held = [len(its) for its in held]
        policy: Callable[[int, int], EvictionPolicy] = eviction or POLICIES[setup.eviction]
        self.pools = [
            Residency(
                slots,
                setup.staging(slots, max(self.num_held)),
                policy(len(shape.num_experts), max(shape.num_experts)),
            )
            for slots in setup.slots
        ]
        self.distances = [StackDistances(count, MEMORY) for count in shape.num_experts]
        self.events = 0
        self.allocation = setup.allocation
        if setup.allocation == "profile":
            assert setup.curves is not None
            self._share_out([np.asarray(curve) for curve in setup.curves])
        elif setup.allocation != "pool":
            self._share_out(None)
        self.planner = None
        if any(pool.staging for pool in self.pools):
            self.planner = PrefetchPlanner(shape.num_experts, shape.top_k, setup.lookahead, setup.max_experts)
        self.stats = CacheStats()
        self.layer_hits, self.layer_misses = [0] * len(self.pool_of), [0] * len(self.pool_of)
        """What `stats` counts as hits and misses, of each layer."""
        self.staged: dict[ExpertKey, int] = {}
        """Bytes moved for what is staged: without a record's padding, where the store has none."""
        self.transfers: Transfers

    def anew(self) -> "CacheController":
        """The same, with nothing resident and nothing counted."""
        return CacheController(self.shape, self.setup)

    def residency(self, layer: int) -> Residency:
        """Of the pool that holds the experts of `layer`."""
        return self.pools[self.pool_of[layer]]

    def layer_residents(self) -> list[int]:
        """Experts of each layer that are resident or on their way on demand; staged ones apart."""
        return np.sum([pool.count for pool in self.pools], axis=0).tolist()

    def layer_floors(self) -> list[int]:
        """Slots that each layer is left with while others have more; empty where no layer has a claim."""
        shares = [self.residency(layer).shares for layer in range(len(self.pool_of))]
        return [int(share[layer]) for layer, share in enumerate(shares) if share is not None]

    def _share_out(self, curves: Sequence[np.ndarray] | None) -> None:
        """Gives every layer its floor. What one token needs stays free: a layer without a share streams through it."""
        shares = [0] * len(self.pool_of)
        for pool, residency in enumerate(self.pools):
            layers = [layer for layer, one in enumerate(self.pool_of) if one == pool]
            experts = [self.num_held[layer] for layer in layers]
            chosen = None if curves is None else [curves[layer] for layer in layers]
            floors = share_out(chosen, experts, residency.capacity - self.shape.top_k)
            for layer, share in zip(layers, floors, strict=True):
                shares[layer] = share
        for residency in self.pools:
            residency.set_shares(shares)

    def _follow_traffic(self, layer: int, experts: Sequence[int]) -> None:
        self.distances[layer].record(experts)
        self.events += 1
        if self.events % (REVISION_STEPS * len(self.pool_of)) == 0:
            self._share_out([one.misses for one in self.distances])

    def begin(
        self,
        layer: int,
        experts: Sequence[int],
        present: Sequence[int] = (),
        expected: np.ndarray | None = None,
    ) -> Request:
        """One event, or one wave of it: pins `experts`, and issues the loads of those that are missing.

        Args:
            layer: MoE layer index.
            experts: distinct ids, at most the pool's capacity.
            present: experts of all of the event's waves, if there are several.
            expected: float `[experts]`, with the event's first wave: the chance that the layer's next event uses each
                expert, as predicted by this event's tokens.
        """
        if self.allocation == "trace" and (not present or experts[0] == present[0]):
            self._follow_traffic(layer, present or experts)
        residency = self.residency(layer)
        if expected is not None:
            residency.policy.expect(layer, expected)
        request = residency.request(layer, experts, present)
        stats = self.stats
        hits, misses = len(request.hits) + len(request.promoted), len(request.loads) + len(request.awaited)
        stats.hits += hits
        self.layer_hits[layer] += hits
        stats.prefetch_hits += len(request.promoted)
        stats.misses += misses
        self.layer_misses[layer] += misses
        stats.late += len(request.awaited)
        for load in request.promoted:
            del self.staged[load.key]
        for load in request.awaited:
            self.transfers.promote(load.key)
        for load in request.loads:
            self._left(load.evicted)
            self.transfers.demand(load)
        return request

    def record_in_place(self, layer: int, experts: Sequence[int], there: Collection[int]) -> list[Load]:
        """One event that has run without waiting (`DeferredRouting`).

        Args:
            layer: MoE layer index.
            experts: distinct ids.
            there: those that it found in slots; the others it read where they were.

        Returns:
            What speculation had staged, and is resident now.
        """
        if self.allocation == "trace":
            self._follow_traffic(layer, experts)
        promoted = self.residency(layer).record_in_place(layer, experts)
        stats, hits = self.stats, len(there)
        misses = len(experts) - hits
        stats.hits += hits
        stats.misses += misses
        stats.in_place += misses
        self.layer_hits[layer] += hits
        self.layer_misses[layer] += misses
        for load in promoted:
            self._left(load.evicted)
            stats.prefetch_hits += load.key[1] in there
            del self.staged[load.key]
        return promoted

    def backfill(self, missed: Sequence[ExpertKey]) -> None:
        """Begins to load some of the experts that a step has read where they were, the soonest needed first.

        Their copies share the link with what later steps read in place, so it is not all of them.
        """
        most = math.ceil(len(missed) * CATCH_UP)
        scores = [pool.policy.scores() for pool in self.pools]
        for key in sorted(missed, key=lambda key: (-scores[self.pool_of[key[0]]][key], key)):
            if most and self.residency(key[0]).want_used(key):
                self.transfers.speculate(key)
                most -= 1

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """The kernel that read these experts has run: they may leave."""
        self.residency(layer).release(layer, experts)

    def prefetch(
        self, layer: int, routing: tuple[np.ndarray, np.ndarray] | None, predict_experts: PredictExperts
    ) -> list[ExpertKey]:
        """Takes in what a router chose, and begins to fetch what its layer's input says of later layers.

        Args:
            layer: MoE layer index; -1: before the step.
            routing: ids, integer `[tokens, top_k]`, and bool of the same shape, what was kept; None for layer -1.
            predict_experts: gives the predictions.
        """
        assert self.planner is not None
        if routing is not None:
            self.planner.record(layer, *routing)
        under_way = sum(
            1
            for pool in self.pools
            for entry in pool.speculative.values()
            if entry.state in (State.QUEUED, State.LOADING) and not entry.cancelled
        )
        planner = self.planner
        return self._speculate(lambda request: planner.plan(layer, predict_experts, request, under_way))

    def begin_step(self, prompt_tokens: int, chances: Sequence[np.ndarray]) -> None:
        """A step is about to run: begins to fetch for its first layers (`PrefetchPlanner.begin_step`)."""
        if self.planner is not None:
            planner = self.planner
            self._speculate(lambda request: planner.begin_step(prompt_tokens, chances, request))

    def _speculate(self, plan: Callable[[RequestPrefetch], object]) -> list[ExpertKey]:
        """Begins to fetch what a plan wants, and returns it.

        A plan that fails midway has queued some: they are fetched all the same, for a layer that asks for one of them
        would wait for it.
        """
        queued: list[ExpertKey] = []

        def request_prefetch(key: ExpertKey, sure: bool) -> bool:
            if not self._want(key, sure):
                return False
            queued.append(key)
            return True

        try:
            plan(request_prefetch)
        finally:
            for key in queued:
                self.transfers.speculate(key)
        return queued

    def _want(self, key: ExpertKey, sure: bool) -> bool:
        return bool(self.held[key]) and self.residency(key[0]).request_prefetch(key, sure)

    def start_speculation(self, key: ExpertKey) -> Load | None:
        """A transfer is free for a queued expert: its slot, or None if it is not to be loaded any more."""
        residency = self.residency(key[0])
        load = residency.start(key)
        if load is not None:
            speculative = residency.entries[key].speculative
            self.stats.prefetches += speculative
            self.stats.caught_up += not speculative
            self._left(load.evicted)
        return load

    def _left(self, key: ExpertKey | None) -> None:
        """An expert has left its slot; what speculation had brought for nobody was of no use."""
        if key in self.staged:
            self.stats.prefetches_wasted += 1
            self.stats.wasted_bytes += self.staged.pop(key)

    def transfer_ended(self, key: ExpertKey, moved: int, complete: bool) -> State:
        """A transfer has moved `moved` bytes, and all of them if `complete`; returns what the expert is now."""
        residency = self.residency(key[0])
        self.stats.fetched_bytes += moved
        self.stats.prefetches_cancelled += residency.entries[key].cancelled
        if complete:
            state = residency.loaded(key)
        else:
            residency.failed(key)
            state = State.ABSENT
        if state is State.ABSENT:
            self.stats.wasted_bytes += moved
        elif state is State.STAGED:
            self.staged[key] = moved
        return state
