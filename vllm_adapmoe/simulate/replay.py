"""Replays a routing trace against a cache, with the worker's own policy code on a virtual link and clock."""

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import Request, waves
from vllm_adapmoe.policy.eviction import EvictionPolicy
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.policy.prefetch_planner import PredictExperts
from vllm_adapmoe.policy.tiles import tile_bytes
from vllm_adapmoe.simulate.trace import Step, Steps, TraceInfo


@dataclass(frozen=True)
class Machine:
    """Speed of the simulated machine. Without bandwidth, loads complete at once and do not take time."""

    bandwidth: float | None = None
    """Link bandwidth, bytes per second."""
    layer_seconds: float = 0.0
    """Time per layer and step, without fetches."""
    step_seconds: float = 0.0
    """Time per step outside its MoE layers."""
    latency: float = 0.0
    """Latency of a load before its first byte."""
    host_records: int | None = None
    """Records that host memory holds (`host_gb`); the others are read from disk. None: it holds all."""
    disk_bandwidth: float | None = None
    """Bandwidth of reading from disk, bytes per second; None: that of the link."""


class VirtualLink:
    """Simulated link with one transfer at a time; demand loads preempt prefetches at tile boundaries."""

    def __init__(self, controller: CacheController, machine: Machine, tier: type[HostTier] = HostTier) -> None:
        self.controller = controller
        self.machine = machine
        self.now = 0.0
        self.urgent: deque[ExpertKey] = deque()
        self.speculative: deque[ExpertKey] = deque()
        self.bytes_left: dict[ExpertKey, int] = {}
        """Bytes not moved yet of each transfer that has begun."""
        self.in_flight: tuple[ExpertKey, int, float] | None = None
        """Tile in flight: its expert, its bytes, and its time of arrival."""
        self.tier: HostTier | None = None
        if machine.host_records is not None:
            shape = controller.shape
            self.tier = tier(machine.host_records, len(shape.num_experts), max(shape.num_experts))
        self.from_disk: set[ExpertKey] = set()
        """Transfers that read from disk."""

    def submit(self, request: Request) -> None:
        """Queues an event's demand loads, and gives the loads in flight that it awaits demand priority."""
        for load in request.awaited:
            self.speculative.remove(load.key)
            self.urgent.append(load.key)
        for load in request.loads:
            self._begin(load.key)
            self.urgent.append(load.key)
            if self.machine.bandwidth is None:
                self._end(self.urgent, load.key)

    def speculate(self, keys: Sequence[ExpertKey]) -> None:
        """Queues experts to load while no demand load is pending."""
        for key in keys:
            self.speculative.append(key)
            if self.machine.bandwidth is None and self._start(key):
                self._end(self.speculative, key)

    def _start(self, key: ExpertKey) -> bool:
        if key in self.bytes_left:
            return True
        if self.controller.start_speculation(key) is None:
            self.speculative.remove(key)
            return False
        self._begin(key)
        return True

    def _begin(self, key: ExpertKey) -> None:
        self.bytes_left[key] = self.controller.expert_bytes[key[0]]
        if self.tier is None:
            return
        if self.tier.hold(key) is not None:
            self.tier.release(key)
            self.controller.stats.host_hits += 1
            return
        self.controller.stats.host_misses += 1
        self.from_disk.add(key)
        if (cell := self.tier.admit(key)) is not None:
            self.tier.commit(key, cell)

    def _end(self, queue: deque[ExpertKey], key: ExpertKey) -> None:
        queue.remove(key)
        self.bytes_left.pop(key)
        self.from_disk.discard(key)
        self.controller.transfer_ended(key, self.controller.expert_bytes[key[0]], complete=True)

    def _next_tile(self) -> bool:
        """Starts the next tile; returns False if there is none to move."""
        while queue := self.urgent or self.speculative:
            key = queue[0]
            if queue is self.speculative and not self._start(key):
                continue
            total = self.controller.expert_bytes[key[0]]
            if self.controller.residency(key[0]).is_cancelled(key):
                queue.popleft()
                self.from_disk.discard(key)
                self.controller.transfer_ended(key, total - self.bytes_left.pop(key), complete=False)
                continue
            bandwidth = self.machine.bandwidth
            assert bandwidth is not None
            if key in self.from_disk:
                bandwidth = min(bandwidth, self.machine.disk_bandwidth or bandwidth)
            tile = min(tile_bytes(total, queue is self.urgent, bandwidth), self.bytes_left[key])
            seconds = tile / bandwidth + (self.machine.latency if self.bytes_left[key] == total else 0)
            self.in_flight = key, tile, self.now + seconds
            self.controller.stats.fetch_seconds += seconds
            return True
        return False

    def run(self, until: float, waiting: Sequence[ExpertKey] = ()) -> None:
        """Moves tiles until time `until`, or, with `waiting`, until all of those experts have arrived."""
        if self.machine.bandwidth is None:
            return
        pending = set(waiting)
        while pending or not waiting:
            if self.in_flight is None and ((self.now >= until and not pending) or not self._next_tile()):
                break
            assert self.in_flight is not None
            key, tile, end = self.in_flight
            if not waiting and end > until:
                break
            self.in_flight = None
            self.now = end
            self.bytes_left[key] -= tile
            if not self.bytes_left[key]:
                self._end(self.urgent if key in self.urgent else self.speculative, key)
                pending.discard(key)
        if not waiting:
            self.now = max(self.now, until)


@dataclass
class Replay:
    """Result of a replay."""

    stats: dict[str, float]
    demand_loads: int
    tokens: int
    seconds: float
    step_seconds: list[float]
    predicted_loads: int
    """Demand loads that an earlier layer had predicted but that were not prefetched, because the link was busy or they
    ranked too low."""


def replay(
    info: TraceInfo,
    steps: Steps,
    setup: CacheSetup,
    machine: Machine | None = None,
    eviction: Callable[[int, int], EvictionPolicy] | None = None,
    tier: type[HostTier] = HostTier,
) -> Replay:
    """Replays every step, layer by layer; all experts that a layer keeps in a step are requested at once.

    `tokens` counts the rows of every step, prompts included.
    """
    machine = machine or Machine()
    controller = CacheController(info.shape, setup, eviction)
    link = VirtualLink(controller, machine, tier)
    time = 0.0
    predicted = tokens = 0
    ends = [0.0]
    for step in steps:
        tokens += len(step.positions)
        link.speculate(
            controller.prefetch_first_layers(step.prompt_tokens, () if step.begin is None else list(step.begin))
        )
        for layer in range(len(info.num_experts)):
            ids, keep_mask = step.ids[layer], step.weights[layer] > 0
            experts = np.flatnonzero(np.bincount(ids[keep_mask], minlength=1))
            groups = waves(experts, controller.residency(layer).capacity)
            for wave, group in enumerate(groups):
                link.run(time)
                expected = step.expected.get(layer) if wave == 0 else None
                request = controller.begin(layer, group, experts if len(groups) > 1 else (), expected)
                link.submit(request)
                if wave == 0 and controller.planner is not None:
                    link.speculate(controller.prefetch(layer, (ids, keep_mask), _predict_experts(step, layer)))
                if controller.planner is not None and request.loads:
                    experts_predicted = _predicted_experts(step, layer, setup.lookahead)
                    predicted += sum(load.key[1] in experts_predicted for load in request.loads)
                waiting = [load.key for load in (*request.loads, *request.awaited)]
                if waiting and machine.bandwidth is not None:
                    link.now = max(link.now, time)
                    link.run(time, waiting)
                    controller.stats.stall_seconds += max(0.0, link.now - time)
                    time = max(time, link.now)
                controller.release(layer, group)
            time += machine.layer_seconds
        if controller.planner is not None and (-1, 1) in step.predicted:  # prediction for the next step's first layer
            link.run(time)
            link.speculate(controller.prefetch(-1, None, _predict_experts(step, -1)))
        time += machine.step_seconds
        link.run(time)
        ends.append(time)
    stats = controller.stats
    return Replay(
        asdict(stats),
        stats.demand_loads,
        tokens,
        time,
        np.diff(ends).tolist(),
        predicted,
    )


def _predicted_experts(step: Step, layer: int, lookahead: int) -> set[int]:
    """Returns the experts that earlier layers of the step predicted for this layer."""
    predictions = (step.predicted.get((layer - distance, distance)) for distance in range(1, lookahead + 1))
    return {
        expert
        for prediction in predictions
        if prediction is not None
        for expert in prediction.ids[prediction.keep_mask].tolist()
    }


def _predict_experts(step: Step, layer: int) -> PredictExperts:
    return lambda distance: step.predicted.get((layer, distance))


def belady(info: TraceInfo, steps: Iterable[Step], slots: Sequence[int], atomic: bool = True) -> np.ndarray:
    """Counts the loads of the optimal (Belady) cache, which knows future accesses but does not prefetch.

    Args:
        info: description of the trace.
        steps: steps of the trace.
        slots: slots of each pool.
        atomic: all experts of an event must be resident together. If False, they may come one after another, which
            gives a lower bound for any cache with that many slots.

    Returns:
        Loads per layer, int64 `[layers]`.
    """
    layers = len(info.num_experts)
    uses, ends = array("H"), array("q", [0])  # flat arrays, since a trace may be long
    for step in steps:
        for ids, weights in zip(step.ids, step.weights, strict=True):
            uses.extend(np.flatnonzero(np.bincount(ids[weights > 0], minlength=1)).tolist())
            ends.append(len(uses))
    never = len(ends) - 1
    following = np.full(len(uses), never)
    """For each use, the next event that uses the same expert."""
    later: dict[ExpertKey, int] = {}
    for event in range(never - 1, -1, -1):
        for use in range(ends[event], ends[event + 1]):
            key = event % layers, uses[use]
            following[use] = later.get(key, never)
            later[key] = event
    resident: list[dict[ExpertKey, int]] = [{} for _ in slots]
    heaps: list[list[tuple[int, ExpertKey]]] = [[] for _ in slots]
    loads = np.zeros(layers, dtype=np.int64)
    for event in range(never):
        layer = event % layers
        pool = info.pool_of[layer]
        pool_residents, heap = resident[pool], heaps[pool]
        experts = uses[ends[event] : ends[event + 1]].tolist()
        next_use = dict(zip(experts, following[ends[event] : ends[event + 1]].tolist(), strict=True))
        groups = waves(experts, slots[pool]) if atomic else [[expert] for expert in experts]
        for group in groups:
            new_entries = []
            for expert in group:
                key = layer, expert
                if key not in pool_residents:
                    loads[layer] += 1
                pool_residents[key] = next_use[expert]
                new_entries.append((-next_use[expert], key))
            while len(pool_residents) > slots[pool]:
                use, key = heapq.heappop(heap)
                if pool_residents.get(key) == -use:  # else an outdated entry of an earlier use
                    del pool_residents[key]
            for entry in new_entries:
                heapq.heappush(heap, entry)
    return loads
