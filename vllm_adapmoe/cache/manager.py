"""ExpertCacheManager: the worker's expert cache, the only object that changes slots."""

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from vllm_adapmoe.cache.demand_copies import DemandCopies
from vllm_adapmoe.cache.slot_maps import SlotMaps
from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.cache.tiered_store import TieredStore
from vllm_adapmoe.cache.transfer import READERS, CacheClosed, TransferEngine
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import Request
from vllm_adapmoe.policy.gpu_state import GpuCounts, GpuState
from vllm_adapmoe.policy.prefetch_planner import PredictExperts
from vllm_adapmoe.store.base import ExpertStore, ExpertsUnavailable

logger = logging.getLogger(__name__)


class Acquisition(NamedTuple):
    """Experts of one event, or of one wave of it, whose loads have been issued (`ExpertCacheManager.begin`)."""

    layer: int
    experts: np.ndarray
    request: Request


class ExpertCacheManager:
    """Expert cache of one worker: a backing store, pools of slots, and for each layer the map expert -> slot.

    One thread requests experts; the reader threads of the transfer engine load them.

    Args:
        store: backing store; read-only from here on.
        controller: makes all decisions; its pools are in the order of the store's layouts.
        device: device of the slots.
        readers: number of reader threads of the transfer engine.
        link_gbps: simulated bandwidth limit of the link, 1e9 bytes per second; None: no limit.
        reader_cpus: CPUs that the readers run on; None: those of the requesting thread.
    """

    controller: CacheController
    transfers: TransferEngine

    def __init__(
        self,
        store: ExpertStore,
        controller: CacheController,
        device: torch.device,
        readers: int = READERS,
        link_gbps: float | None = None,
        reader_cpus: Collection[int] | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.readers = readers
        self.reader_cpus = reader_cpus
        self.pool_of_layer = controller.pool_of
        layouts = [store.layouts[self.pool_of_layer.index(pool)] for pool in range(len(controller.pools))]
        self.pools = [
            SlotPool(layout, residency.num_slots, device)
            for layout, residency in zip(layouts, controller.pools, strict=True)
        ]
        self.closed = False
        self.lent = False
        """Whether a GPU decides: between `lend` and `take_back`."""
        self._demand_copies = DemandCopies(device) if device.type == "cuda" else None
        self._use_controller(controller, link_gbps)

    def _use_controller(self, controller: CacheController, link_gbps: float | None) -> None:
        self.controller = controller
        self._link_gbps = link_gbps
        link = None if link_gbps is None else link_gbps * 1e9
        experts = [self.store.num_experts(layer) for layer in range(self.store.num_layers)]
        self.slot_maps = SlotMaps(controller.pools, self.pool_of_layer, experts)
        self._capacity = [controller.pools[pool].capacity for pool in self.pool_of_layer]
        self.transfers = TransferEngine(
            controller, self.pools, self.store, self.readers, link, self.reader_cpus,
            self._demand_copies if link is None else None,
        )  # fmt: skip

    def _end_transfers(self) -> None:
        """Ends the transfers before a restart."""
        self._check_usable()
        self.transfers.close()
        if self._demand_copies is not None:
            self._demand_copies.finish(self.stats)

    def restart(self, controller: CacheController, link_gbps: float | None) -> None:
        """Restarts the cache between two steps, with another controller, empty slots and the controller's counters."""
        self._end_transfers()
        self._use_controller(controller, link_gbps)

    def resize(self, controller: CacheController, link_gbps: float | None) -> None:
        """Restarts the cache between two steps, with the number of slots that `controller` has.

        Releases the tensors of the old slots first; their memory is freed only if nothing else references them.
        """
        self._end_transfers()
        layouts, device = [pool.layout for pool in self.pools], self.pools[0].device
        self.pools.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for layout, residency in zip(layouts, controller.pools, strict=True):
            self.pools.append(SlotPool(layout, residency.num_slots, device))
        self._use_controller(controller, link_gbps)

    def replace_store(self, store: ExpertStore) -> None:
        """Switches to a store of the same layouts, between two steps; empties the slots and keeps the counters.

        Closes the previous store unless it is the same object. A host tier stays, emptied, before the new store.
        """
        self._end_transfers()
        if isinstance(self.store, TieredStore):
            self.store.renew(store)
        elif store is not self.store:
            self.store.close()
            self.store = store
        before, controller = self.controller, self.controller.empty_copy()
        controller.stats = before.stats
        controller.layer_hits, controller.layer_misses = before.layer_hits, before.layer_misses
        self._use_controller(controller, self._link_gbps)

    def _check_usable(self) -> None:
        """Raises if experts cannot be requested now."""
        if self.closed:
            raise CacheClosed
        self.transfers.check()
        if self.transfers.quiet:
            raise RuntimeError(
                "experts were requested while a CUDA graph is captured, or the GPU decides; run no step of a request "
                "within `quiet`, and none that the host decides between `lend` and `take_back`"
            )

    @property
    def stats(self) -> CacheStats:
        """Cache counters since the start, but for times of copies that the device waits for: `update_stats`."""
        return self.controller.stats

    def update_stats(self) -> CacheStats:
        """Returns the counters, with the times of all copies that have ended; not within `quiet`."""
        if self._demand_copies is not None:
            with self.transfers.lock:
                self._demand_copies.count(self.stats)
        if isinstance(self.store, TieredStore):
            hits, misses = self.store.take_counts()
            self.stats.host_hits += hits
            self.stats.host_misses += misses
        return self.stats

    def pool(self, layer: int) -> SlotPool:
        """Returns the pool that holds the experts of `layer`."""
        return self.pools[self.pool_of_layer[layer]]

    def capacity(self, layer: int) -> int:
        """Returns the maximum number of experts of `layer` that can be acquired together."""
        return self._capacity[layer]

    @property
    def num_slots(self) -> int:
        return sum(pool.num_slots for pool in self.pools)

    @property
    def num_resident(self) -> int:
        return sum(pool.residents + pool.speculating for pool in self.controller.pools)

    def begin(
        self,
        layer: int,
        experts: Sequence[int] | np.ndarray,
        event_experts: Sequence[int] | np.ndarray = (),
        expected: np.ndarray | None = None,
    ) -> Acquisition:
        """Pins the distinct `experts` of `layer` until `release`, and issues the loads of those that are missing.

        On a device, launch the kernel that reads them on the stream that is current now: it may wait for copies.

        Args:
            layer: MoE layer index.
            experts: at most `capacity(layer)`.
            event_experts: experts of all waves of the event, if there are several.
            expected: as in `CacheController.begin`.

        Raises:
            CacheClosed: the cache is closed.
            Exception: a fatal error of the transfers, e.g. of CUDA; every later call raises it again.
            RuntimeError: called within `quiet`.
        """
        experts = np.asarray(experts, dtype=np.int64)
        with self.transfers.lock:
            self._check_usable()
            request = self.controller.begin(layer, experts, event_experts, expected)
            self.transfers.submit(request)
        return Acquisition(layer, experts, request)

    def arrivals(self, acquisition: Acquisition) -> Iterator[np.ndarray]:
        """Yields the experts of an acquisition as they become resident: first those that already were.

        `slot_maps[layer]` holds the slots of those yielded so far. Consume the iterator to its end.

        Raises:
            ExpertsUnavailable: records could not be read; their slots are free again, and nothing is pinned.
            CacheClosed: the cache was closed before the experts were loaded.
            Exception: as in `begin`.
        """
        request = acquisition.request
        resident = acquisition.experts
        if request.loads or request.awaited:
            loading = [load.key[1] for load in (*request.loads, *request.awaited)]
            resident = np.setdiff1d(resident, loading, assume_unique=True)
        if len(resident):
            yield resident
        for arrived in self._arriving(acquisition):
            yield np.array(arrived)

    def _arriving(self, acquisition: Acquisition) -> Iterator[list[int]]:
        """Yields the loads of an acquisition as they end; raises as `arrivals`."""
        request = acquisition.request
        waiting = {load.key for load in (*request.loads, *request.awaited)}
        failed: dict[int, Exception] = {}
        while waiting:
            arrived = []
            for key, failure in self._wait(waiting).items():
                waiting.remove(key)
                if failure is None:
                    arrived.append(key[1])
                else:
                    failed[key[1]] = failure
            if arrived and not failed:
                yield arrived
        if failed:
            self.release(acquisition.layer, acquisition.experts)
            first = next(iter(failed.values()))
            if self.closed:
                raise CacheClosed from first
            raise ExpertsUnavailable(str(first), list(failed)) from first

    def acquire(
        self,
        layer: int,
        experts: Sequence[int] | np.ndarray,
        event_experts: Sequence[int] | np.ndarray = (),
        expected: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Makes experts resident together, and returns the layer's slot map: `begin`, then all `arrivals`."""
        return self.wait(self.begin(layer, experts, event_experts, expected))

    def wait(self, acquisition: Acquisition) -> torch.Tensor:
        """Blocks until all experts of an acquisition are resident; returns the layer's slot map."""
        if acquisition.request.loads or acquisition.request.awaited:
            for _ in self._arriving(acquisition):
                pass
        return self.slot_maps[acquisition.layer]

    def _wait(self, waiting: Collection[ExpertKey]) -> dict[ExpertKey, Exception | None]:
        """Blocks until at least one of those loads has ended; returns the error, or None, of each that has."""
        start = time.perf_counter()
        transfers = self.transfers
        while True:
            with transfers.changed:
                job = None
                while not (ended := [key for key in waiting if key not in transfers.jobs]):
                    transfers.check()
                    if (job := transfers.next_urgent()) is not None:
                        break
                    transfers.changed.wait()
                if job is None:
                    transfers.check()
                    self.stats.stall_seconds += time.perf_counter() - start
                    return {key: transfers.errors.pop(key, None) for key in ended}
            transfers.run(job)

    def release(self, layer: int, experts: Sequence[int] | np.ndarray) -> None:
        """Unpins these experts: the kernel that reads them has been launched, and they may be evicted."""
        self.pool(layer).mark_used()
        with self.transfers.lock:
            self.controller.release(layer, experts)

    @contextmanager
    def whole_layer(self, layer: int) -> Iterator[bool]:
        """Prevents evictions within the context if all of `layer` is resident and unpinned; yields whether it is.

        Slots that kernels launched within it read are not overwritten before these kernels have run.
        """
        with self.transfers.lock:
            self._check_usable()
            whole = self.controller.residency(layer).is_whole(layer, self.store.num_experts(layer))
            self.transfers.frozen += whole
        try:
            yield whole
        finally:
            if whole:
                self._thaw([self.pool(layer)])

    def _thaw(self, pools: Sequence[SlotPool]) -> None:
        try:
            for pool in pools:
                pool.mark_used()
        finally:
            with self.transfers.changed:
                self.transfers.frozen -= 1
                self.transfers.changed.notify_all()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Stops all transfers within the context, so that no thread of the cache calls CUDA during graph capture.

        A CUDA call of any thread of the process can invalidate a capture. Transfers in flight end first; prefetches
        requested meanwhile start afterwards.

        Raises:
            RuntimeError: when entered within itself; within it, also raised by methods that request experts (`begin`,
                `acquire`, `whole_layer`, `restart`, `lend`), which would wait for transfers or record events.
        """
        transfers = self.transfers
        with transfers.lock:
            self._drain()
        try:
            yield
        finally:
            with transfers.lock:
                transfers.resume()

    def record_whole(self, events: Sequence[tuple[int, np.ndarray]]) -> None:
        """Records events of layers that were resident as a whole (`whole_layer`), in order: layer, distinct experts."""
        with self.transfers.lock:
            self.transfers.check()
            for layer, experts in events:
                self.controller.record_whole(layer, experts)

    def _drain(self) -> None:
        """Ends all transfers, and starts none until they are resumed; call with their lock.

        Raises:
            RuntimeError: they have been stopped already.
        """
        self._check_usable()
        try:
            self.transfers.drain()
            if self._demand_copies is not None:
                self._demand_copies.finish(self.stats)
        except BaseException:
            self.transfers.resume()
            raise

    # Steps that a GPU decides

    def lend(self) -> list[ExpertKey]:
        """Ends all transfers and settles staged experts, before a GPU decides; returns the staged ones.

        Until `take_back`, methods that request experts raise, as within `quiet`.
        """
        with self.transfers.lock:
            self._drain()
            self.lent = True
            return self.controller.settle()

    def take_back(self, states: Sequence[GpuState], uses: bool = True) -> None:
        """Takes over what a GPU has decided since `lend`, one state for each pool; `uses`: the uses of experts, too."""
        for pool in self.pools:
            pool.mark_used()
        with self.transfers.lock:
            for index, state in enumerate(states):
                self.controller.adopt(index, state, uses, self.pools[index].record_bytes)
            self.lent = False
            self.transfers.resume()

    def count_on_device(self, pool: int, counted: GpuCounts) -> None:
        """Adds what a GPU has counted in a pool, and sets the residents of its layers (`CacheController`)."""
        with self.transfers.lock:
            self.controller.count_on_device(pool, counted, self.pools[pool].record_bytes)

    def prefetch(
        self, layer: int, routing: tuple[np.ndarray, np.ndarray] | None, predict_experts: PredictExperts
    ) -> None:
        """Records routing and queues prefetches (`CacheController.prefetch`); not while a GPU decides."""
        if self.lent:
            return
        with self.transfers.lock:
            self.transfers.check()
            self.transfers.speculate(self.controller.prefetch(layer, routing, predict_experts))
        self._speculate_inline()

    def prefetch_first_layers(self, prompt_tokens: int, chances: Sequence[np.ndarray]) -> None:
        """Queues prefetches for a step about to run (`CacheController.prefetch_first_layers`); not for a GPU's."""
        if self.lent:
            return
        with self.transfers.lock:
            self.transfers.check()
            self.transfers.speculate(self.controller.prefetch_first_layers(prompt_tokens, chances))
        self._speculate_inline()

    def _speculate_inline(self) -> None:
        """Runs queued speculative loads in the calling thread, if there are no reader threads."""
        while not self.transfers.threads:
            with self.transfers.lock:
                job = self.transfers.next_speculative(during_demand=True)
            if job is None:
                return
            self.transfers.run(job)

    def resident(self) -> np.ndarray:
        """Returns which experts are resident, bool `[layers, experts]`; False beyond the experts of a smaller layer."""
        return self.slot_maps.copy() >= 0

    def resident_or_loading(self, layer: int) -> torch.Tensor:
        """Returns which experts of a layer are resident, staged or being prefetched, host bool `[num_experts]`."""
        with self.transfers.lock:
            staged = [key[1] for key, entry in self.controller.residency(layer).speculative.items()
                      if key[0] == layer and entry.slot >= 0 and not entry.cancelled]  # fmt: skip
        experts = self.slot_maps[layer] >= 0
        experts[staged] = True
        return experts

    def close(self) -> None:
        """Ends the readers, and closes the store once no kernel reads it any more."""
        if not self.closed:
            self.closed = True
            self.transfers.close()
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            except RuntimeError as error:  # already raised where the kernel was launched
                logger.debug("Expert cache: a kernel had failed before the cache was closed: %s", error)
            self.store.close()
