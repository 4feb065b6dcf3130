"""The one object of a worker that changes slots."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch

from vllm_adapmoe.cache.eviction import LRU
from vllm_adapmoe.cache.slot_table import Load, SlotTable
from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.store.base import ExpertStore

READERS = 4
"""Threads that read records. A disk wants a few requests in flight; more only contend for the cores."""


@dataclass
class CacheStats:
    """Counted per step and layer over distinct experts, since the engine started."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    stall_seconds: float = 0.0


class ExpertCacheManager:
    """Experts of one worker: a backing store, pools of slots, and for each layer the map expert -> slot.

    Args:
        store: backing copies; read-only from here on.
        pool_of: for each MoE layer, the index of its pool.
        slots: slots of each pool.
        device: where the slots are.
    """

    def __init__(self, store: ExpertStore, pool_of: Sequence[int], slots: Sequence[int], device: torch.device) -> None:
        self.store = store
        self.stats = CacheStats()
        layouts = [store.layouts[pool_of.index(pool)] for pool in range(len(slots))]
        self.pools = [SlotPool(layout, count, device) for layout, count in zip(layouts, slots, strict=True)]
        self.tables = [SlotTable(count, LRU()) for count in slots]
        self.pool_of_layer = list(pool_of)
        self.slot_maps = [
            torch.full((store.num_experts(layer),), -1, dtype=torch.int32) for layer in range(len(pool_of))
        ]
        """Per layer, on the host, int32 `[num_experts]`: the slot of each expert, -1 for one that is not resident."""
        self._maps = [slot_map.numpy() for slot_map in self.slot_maps]
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="expert-reader")

    def pool(self, layer: int) -> SlotPool:
        """The pool that holds the experts of `layer`."""
        return self.pools[self.pool_of_layer[layer]]

    @property
    def num_slots(self) -> int:
        return sum(pool.num_slots for pool in self.pools)

    @property
    def num_resident(self) -> int:
        return sum(len(table.slot_of) for table in self.tables)

    def acquire(self, layer: int, experts: Sequence[int]) -> torch.Tensor:
        """Makes the distinct `experts` of `layer` resident together, and returns the layer's slot map.

        Blocks until what was missing has arrived. At most as many experts as the pool has slots.

        Raises:
            StoreError: a record could not be read; its slot is free again.
        """
        pool = self.pool_of_layer[layer]
        loads = self.tables[pool].request([(layer, expert) for expert in experts])
        self.stats.hits += len(experts) - len(loads)
        if loads:
            self._fetch(self.pools[pool], self.tables[pool], loads)
        return self.slot_maps[layer]

    def _fetch(self, pool: SlotPool, table: SlotTable, loads: list[Load]) -> None:
        start = time.perf_counter()
        for load in loads:
            if load.evicted is not None:
                self._maps[load.evicted[0]][load.evicted[1]] = -1
        if len(loads) == 1:
            failures = [self._read(pool, loads[0])]
        else:
            reads = [self._readers.submit(self._read, pool, load) for load in loads]
            wait(reads)
            failures = [read.result() for read in reads]
        for load, failure in zip(loads, failures, strict=True):
            if failure is None:
                self._maps[load.key[0]][load.key[1]] = load.slot
            else:
                table.forget(load.key)
        self.stats.misses += len(loads)
        self.stats.fetched_bytes += len(loads) * pool.layout.nbytes
        self.stats.stall_seconds += time.perf_counter() - start
        for failure in failures:
            if failure is not None:
                raise failure

    def _read(self, pool: SlotPool, load: Load) -> Exception | None:
        try:
            pool.fill(load.slot, partial(self.store.read, load.key))
        except Exception as error:  # raised again by _fetch, once every other read has ended
            return error
        return None

    def close(self) -> None:
        """Ends the readers and lets go of the store."""
        self._readers.shutdown(wait=True)
        self.store.close()
