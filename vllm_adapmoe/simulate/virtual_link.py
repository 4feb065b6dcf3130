"""VirtualLink: moves the experts of a replay over a link of a given speed, on a clock of its own."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import Request
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.policy.tiles import tile_bytes


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

    def drain(self, time: float) -> float:
        """Ends, from `time` on, what is in flight, and drops what is queued, before a GPU decides; returns the end."""
        self.run(time)
        self.speculative = deque(key for key in self.speculative if key in self.bytes_left)
        self.run(time, [*self.bytes_left])
        return max(time, self.now)
