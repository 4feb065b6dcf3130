"""CacheController: all decisions of an expert cache, event by event; the worker and the simulator run the same class.

An event is one MoE layer's request for the distinct experts of one step.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vllm_adapmoe.experts import CacheShape, ExpertKey
from vllm_adapmoe.policy.allocation import StackDistances, allocate_floors
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.policy.events import Load, Request, State
from vllm_adapmoe.policy.eviction import POLICIES, EvictionPolicy
from vllm_adapmoe.policy.gpu_state import GpuCounts, GpuState
from vllm_adapmoe.policy.prefetch_planner import PredictExperts, PrefetchPlanner, RequestPrefetch
from vllm_adapmoe.policy.residency import Residency

TRAFFIC_MEMORY = 1024.0
"""Events of a layer after which the weight of its older stack distances has faded to 1/e."""
REVISION_STEPS = 256
"""Steps between two revisions of the floors with `allocation=trace`."""


class CacheController:
    """Decides for all pools what is resident and what is prefetched, and counts.

    Every decision is returned; `ExpertCacheManager`, or a replay, carries it out and reports back with
    `start_speculation` and `transfer_ended`.

    Args:
        shape: the model's experts.
        setup: slots and policies.
        eviction: makes a pool's policy from the numbers of layers and experts; None: the policy that the setup names.
    """

    def __init__(
        self, shape: CacheShape, setup: CacheSetup, eviction: Callable[[int, int], EvictionPolicy] | None = None
    ) -> None:
        self.shape, self.setup = shape, setup
        self.pool_of = list(shape.pool_of)
        self.expert_bytes = list(shape.expert_bytes)
        local_experts = shape.local_experts
        if local_experts is None:
            local_experts = [range(count) for count in shape.num_experts]
        self.is_local = np.zeros((len(local_experts), max(shape.num_experts)), dtype=bool)
        """Bool `[layers, experts]`: experts that this rank holds."""
        for row, layer_experts in zip(self.is_local, local_experts, strict=True):
            row[list(layer_experts)] = True
        self.num_local = [len(layer_experts) for layer_experts in local_experts]
        policy: Callable[[int, int], EvictionPolicy] = eviction or POLICIES[setup.eviction]
        self.pools = [
            Residency(
                slots,
                setup.staging(slots, max(self.num_local)),
                policy(len(shape.num_experts), max(shape.num_experts)),
            )
            for slots in setup.slots
        ]
        self.distances = [StackDistances(count, TRAFFIC_MEMORY) for count in shape.num_experts]
        self.events = 0
        self.allocation = setup.allocation
        if setup.allocation == "profile":
            assert setup.curves is not None
            self._set_floors([np.asarray(curve) for curve in setup.curves])
        elif setup.allocation != "pool":
            self._set_floors(None)
        self.planner = None
        if any(pool.staging for pool in self.pools):
            self.planner = PrefetchPlanner(
                shape.num_experts, shape.top_k, setup.lookahead, setup.max_experts, self, shape.expert_bytes
            )
        self.stats = CacheStats()
        self.layer_hits, self.layer_misses = [0] * len(self.pool_of), [0] * len(self.pool_of)
        """Hits and misses of each layer, counted as in `stats`."""
        self.device_bytes = 0
        """Part of `stats.fetched_bytes` that a GPU has fetched by itself; likewise the next two."""
        self.device_fetch_seconds = self.device_stall_seconds = 0.0
        self.staged: dict[ExpertKey, int] = {}
        """Bytes transferred for each staged expert, without the record's padding if the store does not transfer it."""
        self._prefetched_by_gpu: set[ExpertKey] = set()
        """Those that a GPU has prefetched: they are resident, and not used yet."""

    def empty_copy(self) -> "CacheController":
        """Returns a controller of the same setup, with nothing resident and all counters at zero."""
        return CacheController(self.shape, self.setup)

    def residency(self, layer: int) -> Residency:
        """Returns the residency of the pool that holds the experts of `layer`."""
        return self.pools[self.pool_of[layer]]

    def slots_of(self, layer: int) -> np.ndarray:
        """Returns the slots of a layer's experts, int32 `[experts or more]`, -1 for those not resident."""
        return self.residency(layer).slots[layer]

    def is_complete(self, layer: int) -> bool:
        """Returns whether all of this rank's experts of a layer are resident or loading on demand."""
        return self.residency(layer).count[layer] == self.num_local[layer]

    def layer_residents(self) -> list[int]:
        """Returns the experts of each layer that are resident or loading on demand; staged ones do not count."""
        return [self.residency(layer).count[layer] for layer in range(len(self.pool_of))]

    def layer_floors(self) -> list[int]:
        """Returns the minimum slots of each layer protected from eviction; empty without floors."""
        if all(pool.floors is None for pool in self.pools):
            return []
        floors = [self.residency(layer).floors for layer in range(len(self.pool_of))]
        return [int(pool_floors[layer]) for layer, pool_floors in enumerate(floors) if pool_floors is not None]

    def _set_floors(self, curves: Sequence[np.ndarray] | None) -> None:
        """Sets every layer's floor; leaves `top_k` slots of each pool unassigned, for layers without a floor."""
        floors = [0] * len(self.pool_of)
        for pool, residency in enumerate(self.pools):
            layers = [layer for layer, pool_of_layer in enumerate(self.pool_of) if pool_of_layer == pool]
            experts = [self.num_local[layer] for layer in layers]
            pool_curves = None if curves is None else [curves[layer] for layer in layers]
            pool_floors = allocate_floors(pool_curves, experts, residency.capacity - self.shape.top_k)
            for layer, floor in zip(layers, pool_floors, strict=True):
                floors[layer] = floor
        for residency in self.pools:
            residency.set_floors(floors)

    def _record_traffic(self, layer: int, experts: Sequence[int]) -> None:
        self.distances[layer].record(experts)
        self.events += 1
        if self.events % (REVISION_STEPS * len(self.pool_of)) == 0:
            self._set_floors([distances.misses for distances in self.distances])

    def begin(
        self,
        layer: int,
        experts: Sequence[int] | np.ndarray,
        event_experts: Sequence[int] | np.ndarray = (),
        expected: np.ndarray | None = None,
    ) -> Request:
        """Handles one event, or one wave of it: pins `experts`, and returns which of them have to be loaded.

        Args:
            layer: MoE layer index.
            experts: distinct ids, at most the pool's capacity.
            event_experts: experts of all waves of the event, if there are several.
            expected: float `[experts]`, with the event's first wave: the chance that the layer's next event uses each
                expert, as predicted from this event's tokens.
        """
        if self.allocation == "trace" and (not len(event_experts) or experts[0] == event_experts[0]):
            self._record_traffic(layer, list(event_experts if len(event_experts) else experts))
        request = self._request(layer, experts, event_experts, expected)
        if self.planner is not None:
            self.planner.record_missing(layer, len(experts) - request.hits)
        return request

    def _request(
        self,
        layer: int,
        experts: Sequence[int] | np.ndarray,
        event_experts: Sequence[int] | np.ndarray,
        expected: np.ndarray | None,
    ) -> Request:
        """Requests the experts of an event, and counts."""
        request = self.residency(layer).request(layer, experts, event_experts, expected)
        stats = self.stats
        hits = request.hits + len(request.promoted)
        misses = len(experts) - hits
        stats.hits += hits
        self.layer_hits[layer] += hits
        stats.prefetch_hits += len(request.promoted)
        stats.misses += misses
        self.layer_misses[layer] += misses
        stats.late += len(request.awaited)
        for load in request.promoted:
            del self.staged[load.key]
        self._count_prefetch_hits(layer, experts)
        for load in (*request.promoted, *request.awaited, *request.loads):
            self._count_wasted(load.evicted)
        return request

    def record_whole(self, layer: int, experts: np.ndarray) -> None:
        """Records one event of a layer all of whose experts were resident; `experts`: distinct ids, int64."""
        if self.allocation == "trace":
            self._record_traffic(layer, experts.tolist())
        self.residency(layer).record_use(layer, experts)
        self._count_prefetch_hits(layer, experts)
        self.stats.hits += len(experts)
        self.layer_hits[layer] += len(experts)
        if self.planner is not None:
            self.planner.record_missing(layer, 0)

    def settle(self) -> list[ExpertKey]:
        """Makes staged experts resident, before a GPU decides (`Residency.settle`); returns them."""
        for pool in self.pools:
            pool.settle()
        staged = list(self.staged)
        self.staged.clear()
        self._prefetched_by_gpu.clear()
        return staged

    def adopt(self, pool: int, state: GpuState, uses: bool, nbytes: int) -> None:
        """Takes over what a GPU has decided since `settle`.

        Args:
            pool: index of the pool.
            state: its state.
            uses: whether to take over the uses of experts, too.
            nbytes: bytes that a fetch moves.
        """
        residency = self.pools[pool]
        if uses:
            residency.policy.adopt(state)
        self.staged |= dict.fromkeys(state.prefetched, nbytes)
        self._prefetched_by_gpu |= set(state.prefetched)
        self._adopt_slots(residency, state.slots, state.free)

    def _adopt_slots(self, residency: Residency, slots: np.ndarray, free: Sequence[int]) -> None:
        for key in residency.adopt(slots, free):
            self._count_wasted(key)

    def _count_prefetch_hits(self, layer: int, experts: Sequence[int] | np.ndarray) -> None:
        """Counts the experts of an event that a GPU has prefetched."""
        if not self._prefetched_by_gpu:
            return
        for expert in experts:
            key = layer, int(expert)
            if key in self._prefetched_by_gpu:
                self._prefetched_by_gpu.discard(key)
                del self.staged[key]
                self.stats.prefetch_hits += 1

    def count_on_device(self, pool: int, counted: GpuCounts, nbytes: int) -> None:
        """Adds what a GPU has counted since the last call, and sets the number of residents.

        Args:
            pool: index of the pool.
            counted: what it has counted.
            nbytes: bytes that a fetch moves.
        """
        layers = [layer for layer, pool_of_layer in enumerate(self.pool_of) if pool_of_layer == pool]
        stats, hits, misses = self.stats, counted.hits, counted.misses
        # A GPU does not tell how long it has waited: taken to be as long as the host's fetches of so many bytes.
        fetched, ours = stats.fetched_bytes - self.device_bytes, stats.fetch_seconds - self.device_fetch_seconds
        seconds = ours / fetched if fetched > 0 else 0.0
        demanded, moved = int(misses.sum()) * nbytes, (int(misses.sum()) + counted.prefetches) * nbytes
        stats.stall_seconds += demanded * seconds
        stats.fetch_seconds += moved * seconds
        self.device_stall_seconds += demanded * seconds
        self.device_fetch_seconds += moved * seconds
        self.device_bytes += moved
        stats.hits += int(hits.sum())
        stats.misses += int(misses.sum())
        stats.prefetches += counted.prefetches
        stats.prefetch_hits += counted.prefetch_hits
        stats.prefetches_wasted += counted.prefetches_wasted
        stats.wasted_bytes += counted.prefetches_wasted * nbytes
        stats.fetched_bytes += moved
        for layer in layers:
            self.layer_hits[layer] += int(hits[layer])
            self.layer_misses[layer] += int(misses[layer])
        self.pools[pool].show_residents(counted.residents)

    def lend(self) -> None:
        """Begins a replay of what a GPU does, which uses all slots for everything (`decide_on_device`)."""
        for key in self.settle():
            self.staged[key] = self.expert_bytes[key[0]]
            self._prefetched_by_gpu.add(key)

    def take_back(self) -> None:
        """Ends a replay of what a GPU does: evicts what is beyond the host's share of the slots."""
        for pool in self.pools:
            self._adopt_slots(pool, pool.slots, pool.free)

    def decide_on_device(
        self, layer: int, experts: Sequence[int] | np.ndarray, expected: np.ndarray | None, votes: np.ndarray | None
    ) -> tuple[list[Load], list[Load]]:
        """Handles one event as a GPU does that decides by itself (`device.claim`), for a replay of what it does.

        The experts are resident when the layer's kernel runs, and the prefetches when the next layer's does.

        Args:
            layer: MoE layer index.
            experts: distinct ids.
            expected: as in `begin`.
            votes: tokens that are predicted to use each expert of the next layer, integer `[experts]`; None: no
                prefetch.

        Returns:
            Demand loads, and prefetches.
        """
        request = self._request(layer, experts, (), expected)
        for load in request.loads:
            self.transfer_ended(load.key, self.expert_bytes[layer], complete=True)
        ahead: list[Load] = []
        following = self.pool_of[layer + 1 : layer + 2]
        if votes is not None and following == [self.pool_of[layer]]:  # a GPU decides pool by pool
            residency = self.residency(layer)
            ahead = residency.request_ahead(layer + 1, votes, self.setup.max_experts)
            nbytes = self.expert_bytes[layer + 1]
            for load in ahead:
                self._count_wasted(load.evicted)
                self.staged[load.key] = nbytes
                self._prefetched_by_gpu.add(load.key)
            self.stats.prefetches += len(ahead)
            self.stats.fetched_bytes += nbytes * len(ahead)
        self.release(layer, experts)
        return request.loads, ahead

    def release(self, layer: int, experts: Sequence[int] | np.ndarray) -> None:
        """Unpins these experts: the kernel that reads them has been launched, and they may be evicted."""
        self.residency(layer).release(layer, experts)

    def prefetch(
        self, layer: int, routing: tuple[np.ndarray, np.ndarray] | None, predict_experts: PredictExperts
    ) -> list[ExpertKey]:
        """Records what a layer's router selected, and queues prefetches of the experts predicted for later layers.

        Args:
            layer: MoE layer index; -1: between two steps.
            routing: ids, integer `[tokens, top_k]`, and the mask of those kept, bool of the same shape; None for
                layer -1.
            predict_experts: returns the predictions for a layer, by its distance.

        Returns:
            The queued experts.
        """
        assert self.planner is not None
        if routing is not None:
            self.planner.record(layer, *routing)
        planner = self.planner
        if not planner.has_targets(layer):
            return []
        in_flight = sum(
            1
            for pool in self.pools
            for entry in pool.speculative.values()
            if entry.state in (State.QUEUED, State.LOADING) and not entry.cancelled
        )
        return self._queue(lambda request: planner.plan(layer, predict_experts, request, in_flight))

    def prefetch_first_layers(self, prompt_tokens: int, chances: Sequence[np.ndarray]) -> list[ExpertKey]:
        """Queues prefetches for the first layers of a step that is about to run (`PrefetchPlanner.plan_first_layers`).

        Returns:
            The queued experts; none without prefetch.
        """
        if self.planner is None:
            return []
        planner = self.planner
        return self._queue(lambda request: planner.plan_first_layers(prompt_tokens, chances, request))

    def _queue(self, plan: Callable[[RequestPrefetch], list[ExpertKey]]) -> list[ExpertKey]:
        """Returns the experts that a plan queues. If it fails, queues none: a layer would wait for them forever."""
        queued: list[ExpertKey] = []

        def request_prefetch(key: ExpertKey, near_certain: bool) -> bool:
            if not self.is_local[key] or not self.residency(key[0]).request_prefetch(key, near_certain):
                return False
            queued.append(key)
            return True

        try:
            return plan(request_prefetch)
        except BaseException:
            for key in queued:
                self.residency(key[0]).unqueue(key)
            raise

    def start_speculation(self, key: ExpertKey) -> Load | None:
        """Assigns a slot to a queued expert whose transfer can start; None if it is not needed or gets no slot."""
        residency = self.residency(key[0])
        load = residency.start_load(key)
        if load is not None:
            self.stats.prefetches += 1
            self._count_wasted(load.evicted)
        return load

    def _count_wasted(self, key: ExpertKey | None) -> None:
        """Counts an evicted expert as a wasted prefetch if it was still staged."""
        if key in self.staged:
            self.stats.prefetches_wasted += 1
            self.stats.wasted_bytes += self.staged.pop(key)
            self._prefetched_by_gpu.discard(key)

    def transfer_ended(self, key: ExpertKey, moved: int, complete: bool) -> State:
        """Records the end of a transfer of `moved` bytes, the whole record if `complete`; returns the new state."""
        residency = self.residency(key[0])
        self.stats.fetched_bytes += moved
        self.stats.prefetches_cancelled += residency.entries[key].cancelled
        if complete:
            state = residency.complete_load(key)
        else:
            residency.fail_load(key)
            state = State.ABSENT
        if state is State.ABSENT:
            self.stats.wasted_bytes += moved
        elif state is State.STAGED:
            self.staged[key] = moved
        return state
