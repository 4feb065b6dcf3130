"""DeviceResidency: the residency of one pool on the GPU, which decides decode steps by itself (`claim`)."""

import numpy as np
import torch

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.eviction import EvictionPolicy, NextUse
from vllm_adapmoe.policy.gpu_state import GpuState
from vllm_adapmoe.policy.residency import Residency

COUNTERS = ("prefetches", "prefetch_hits", "prefetches_wasted", "lost")
"""Counters of the pool, before those of the layers: their hits and misses in turn. `lost`: experts without a slot."""


class Loads:
    """Copies that an event wants: records of demand loads, then records of prefetches, and how many of each.

    Args:
        max_loads: maximum of each.
        device: device of the slots.
    """

    def __init__(self, max_loads: int, device: torch.device) -> None:
        self.max_loads = max_loads
        self.entries = torch.zeros((2, max_loads, 2), dtype=torch.int64, device=device)
        """Address of the record, and slot: int64 `[demand or prefetch, max_loads, 2]`."""
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        """Number of entries, int32 `[demand or prefetch]`."""


class DeviceResidency:
    """Which expert is in which slot of a pool, and what evicting needs, in tensors that keep their addresses.

    Args:
        residency: the pool's residency on the host.
        records: host address of each expert's record, int64 `[layers, experts]`, on the device; 0 for experts of other
            pools and ranks.
        device: device of the slots.
    """

    def __init__(self, residency: Residency, records: torch.Tensor, device: torch.device) -> None:
        layers, experts = records.shape
        self.records = records

        def make(*shape: int, dtype: torch.dtype = torch.int32, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.slot_of = make(layers, experts + 1, value=-1)
        """Slot of each expert, int32 `[layers, experts + 1]`; -1: not resident, and for the id that dropped pairs have.
        A row is the map of its layer's kernel."""
        self.quick, self.slow = make(layers, experts), make(layers, experts)
        """Means of uses (`NextUse`), int32 `[layers, experts]`."""
        self.wait = make(layers, experts, dtype=torch.int64)
        """Waits (`EvictionPolicy`), int64 `[layers, experts]`."""
        self.best, self.best_wait = make(layers), make(layers, dtype=torch.int64)
        """Each layer's best victim, int32 `[layers]`, -1: none; and its wait, int64."""
        self.count, self.floors = make(layers), make(layers)
        """Residents of each layer, and its floor, int32 `[layers]`."""
        self.free = make(max(1, residency.num_slots))
        """Free slots, int32 `[slots]`, of which `scalars` has the number."""
        self.scalars = make(3, dtype=torch.int64)
        """Free slots, events so far, layer of the last event."""
        self.prefetched = make(layers, experts)
        """1 for experts that were prefetched and not used since, int32 `[layers, experts]`."""
        self.counters = make(len(COUNTERS) + 2 * layers, dtype=torch.int64)
        """Counters since the last `upload`: `COUNTERS`, then hits and misses of each layer."""
        self.has_floors = False
        self._uploaded: list[torch.Tensor] = []
        """Host memory that the last `upload` copies from."""
        self._use_policy(residency.policy)

    def _use_policy(self, policy: EvictionPolicy) -> None:
        self.by_distance = isinstance(policy, NextUse)
        """Whether the policy is `NextUse` or derived from it; else it is `LRU`."""
        self.rates = policy.rates if isinstance(policy, NextUse) else (0, 0, 0, 0)
        self.share = policy.share if isinstance(policy, NextUse) else 0
        self.ahead_limit = policy.ahead_limit if isinstance(policy, NextUse) else len(policy.wait)
        """Minimum wait of an expert that a prefetch evicts; with `LRU`, from which the events so far are subtracted."""

    def upload(self, residency: Residency, prefetched: list[ExpertKey]) -> None:
        """Takes over from the host, on the current stream.

        Args:
            residency: the pool's residency, without queued, loading or staged experts (`Residency.settle`).
            prefetched: experts that were prefetched and not used since.
        """
        assert not residency.entries and not residency.pins.any()
        policy = residency.caught_up()
        flags = np.zeros(self.prefetched.shape, np.int32)
        for key in prefetched:
            flags[key] = 1
        best, best_wait = residency.best_victims()
        self.has_floors = residency.floors is not None
        values = [
            (self.slot_of[:, :-1], residency.slots), (self.wait, policy.wait), (self.best, best),
            (self.best_wait, best_wait), (self.count, residency.count), (self.prefetched, flags),
            (self.free[: len(residency.free)], residency.free),
            (self.scalars, [len(residency.free), getattr(policy, "events", 0), 0]),
        ]  # fmt: skip
        if isinstance(policy, NextUse):
            values += [(self.quick, policy.quick), (self.slow, policy.slow)]
        if residency.floors is not None:
            values.append((self.floors, residency.floors))
        # Page-locked, so that the host waits for nothing. The last ones were read before the state was downloaded.
        self._uploaded = [torch.from_numpy(np.ascontiguousarray(array)) for _, array in values]
        if self.counters.is_cuda:
            self._uploaded = [array.pin_memory() for array in self._uploaded]
        for (tensor, _), array in zip(values, self._uploaded, strict=True):
            tensor.copy_(array, non_blocking=True)
        self.counters.fill_(0)

    def download(self) -> GpuState:
        """Waits for the GPU, and returns its state for `Residency.adopt`."""
        copy = HostCopy(self.scalars, self.free, self.slot_of, self.wait, self.quick, self.slow, self.prefetched)
        copy.wait()
        scalars, free, slot_of, wait, quick, slow, flags = (tensor.numpy() for tensor in copy.tensors)
        num_free, events, last_layer = scalars.tolist()
        prefetched = [(layer, expert) for layer, expert in np.argwhere(flags).tolist()]
        return GpuState(slot_of[:, :-1], free[:num_free].tolist(), wait, quick, slow, events, last_layer, prefetched)
