"""The order of what the cache gives to a device: the real pools, engine, manager, tables on a played CUDA runtime."""

import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.cache.fake_cuda import Event, FakeCuda
from tests.cache.schedule import Stopped
from tests.store.test_stores import Contended
from vllm_adapmoe.cache import slots, transfer
from vllm_adapmoe.cache.demand_copies import DemandCopies
from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.cache.tiered_store import TieredStore
from vllm_adapmoe.device import fetch as fetch_module
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.fetch import Fetch
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.device.residency import Loads
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import aligned_empty, as_bytes

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 3, 4, 2, 64, 64
POOL_OF = [0, 0, 1]
GATE_UP, DOWN = "w13_weight", "w2_weight"
DEVICE = torch.device("cuda", 0)
CELLS = 4
"""Records that fit into a host tier, of twelve."""
SCHEDULES, STEPS = 200, 5
"""Random schedules of so many random steps each; together some ten seconds."""
PLANTED = 60
"""Of those, the ones in which a planted fault has to be found."""
IN_FLIGHT = 2
"""Steps that the host is ahead of the device, as vLLM's asynchronous scheduling is."""


def random_half(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << 14, shape, generator=generator, dtype=torch.int16).view(torch.float16)


WEIGHTS = [
    {
        GATE_UP: random_half(EXPERTS, 2 * INNER, HIDDEN, seed=2 * layer),
        DOWN: random_half(EXPERTS, HIDDEN, INNER, seed=2 * layer + 1),
    }
    for layer in range(LAYERS)
]
BYTES = [
    {name: [as_bytes(one).numpy().tobytes() for one in tensor] for name, tensor in tensors.items()}
    for tensors in WEIGHTS
]


@dataclass(frozen=True)
class Setup(CacheSetup):
    """An eighth of the slots would be too little speculation to see anything."""

    def staging(self, slots: int, num_experts: int) -> int:
        return min(2, slots - TOP_K)


class PlayedStore(HostStore):
    """Host memory that is page-locked, but for some layers.

    Args:
        cuda: where it is page-locked.
        unlocked: layers that are not.
    """

    def __init__(self, cuda: FakeCuda, unlocked: set[int]) -> None:
        super().__init__(torch.device("cpu"))
        self.cuda, self.unlocked = cuda, unlocked
        for layer, tensors in enumerate(WEIGHTS):
            self.put_layer(layer, tensors)
            if layer not in unlocked:
                cuda.page_locked(self._layers[layer][1])
        self.seal()

    def page_locked(self, key: tuple[int, int]) -> torch.Tensor | None:
        return None if key[0] in self.unlocked else super().page_locked(key)

    def close(self) -> None:
        for layer, (_, records) in self._layers.items():
            if layer not in self.unlocked:
                self.cuda.touch(records, write=True, what="giving the store's memory back")
        super().close()


class Churning(HostTier):
    """Takes in every record, over the one that came first, so that few steps see many evictions."""

    def admit(self, key: tuple[int, int]) -> int | None:
        self.counts[key] = self.counts.max() + 1
        return super().admit(key)


class PlayedTier(TieredStore):
    """A host tier of few page-locked records, before a file with all of them.

    Args:
        cuda: where its memory is page-locked.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        file = PlayedStore(cuda, set(range(LAYERS)))
        super().__init__(file, CELLS * file.layouts[0].nbytes, torch.device("cpu"))
        for cells in self._cells.values():
            cells.tier = Churning(CELLS, LAYERS, EXPERTS)
            cells.page_locked = True
            cuda.page_locked(cells.records)

    def close(self) -> None:
        for cells in self._cells.values():
            cells.page_locked = False
            self.cuda.touch(cells.records, write=True, what="giving the store's memory back")
        super().close()


class Worker:
    """A worker's steps: fetched by the host layer by layer, decided on the device, or of whole layers."""

    def __init__(self, cuda: FakeCuda, seed: int) -> None:
        self.cuda, self.random = cuda, random.Random(seed)
        page_locked = seed % 2 == 0
        tiered = seed % 4 == 1
        store = PlayedTier(cuda) if tiered else PlayedStore(cuda, set() if page_locked else {1, 2})
        shape = CacheShape([EXPERTS] * LAYERS, TOP_K, POOL_OF, [layout.nbytes for layout in store.layouts])
        slots = [self.random.choice([4, 7]), self.random.choice([5, 6])]
        setup = Setup(slots, "next_use", lookahead=2, max_experts=3)
        readers = self.random.choice([1, 2, 3])
        self.cache = ExpertCacheManager(store, CacheController(shape, setup), DEVICE, readers)
        self.decode = None
        if page_locked:
            self.decode = DeviceDecode(self.cache, TOP_K, 2, DEVICE)
            claim, self.decode._claim = self.decode._claim, lambda *args: self.launch_claim(claim, *args)
            self.decode._fetches = [partial(self.launch_fetch, fetch) for fetch in self.decode._fetches]
        self.seen: Counter = Counter()
        self.ends: deque[Event] = deque()
        self.asked: deque[np.ndarray] = deque()
        """Ids of steps that the device has decided, and were not taken in yet."""

    def step(self) -> None:
        """Any step, launched when the step before the last has ended."""
        ways = [self.fetched, self.fetched, self.fetched, self.whole, self.captured, self.restarted]
        if self.decode is None:
            ways.append(self.replaced)
        else:
            self.drain_finished()
            ways += [self.decided] * 8
        way = self.random.choice(ways)
        if self.decode is not None and way != self.decided:
            self.seen["given back"] += self.decode.owns
            self.decode.give_back()
        self.seen[way.__name__] += 1
        way()
        end: Any = torch.cuda.Event()
        end.record()
        self.ends.append(end)
        if len(self.ends) == IN_FLIGHT:
            self.ends.popleft().synchronize()

    # Fetched

    def fetched(self) -> None:
        for layer in range(LAYERS):
            experts = sorted(self.random.sample(range(EXPERTS), self.random.randint(1, TOP_K)))
            acquisition = self.cache.begin(layer, experts)
            self.prefetch(layer)
            slots = self.cache.wait(acquisition)
            self.launch_on_slots(layer, {expert: int(slots[expert]) for expert in experts})
            self.cache.release(layer, experts)

    def prefetch(self, layer: int) -> None:
        predicted = {
            distance: PredictedExperts(
                np.array([self.random.sample(range(EXPERTS), TOP_K)] * 4), np.ones((4, TOP_K), dtype=bool)
            )
            for distance in range(1, LAYERS - layer)
        }
        self.cache.prefetch(layer, None, predicted.get)

    def launch_on_slots(self, layer: int, slots: dict[int, int]) -> None:
        tensors = self.cache.pool(layer).tensors
        reads = [tensor[slot] for tensor in tensors.values() for slot in slots.values()]

        def run() -> None:
            for name, tensor in tensors.items():
                for expert, slot in slots.items():
                    if tensor[slot].numpy().tobytes() != BYTES[layer][name][expert]:
                        self.cuda.fault("a kernel ran other weights than those of its experts")

        self.cuda.launch(reads, [], run)

    def whole(self) -> None:
        for layer in range(LAYERS):
            if self.cache.capacity(layer) >= EXPERTS:
                self.cache.acquire(layer, list(range(EXPERTS)))
                self.cache.release(layer, list(range(EXPERTS)))
            with self.cache.whole_layer(layer) as whole:
                self.seen["whole layers"] += whole
                if whole:
                    self.launch_on_slots(layer, dict(enumerate(self.cache.slot_maps[layer].tolist())))

    def captured(self) -> None:
        """A graph is captured while speculation is on its way."""
        self.prefetch(0)
        with self.cache.quiet(), self.cuda.capture():
            for _ in range(10):
                self.cuda.launch([], [])

    def restarted(self) -> None:
        self.prefetch(0)
        self.cache.restart(self.cache.controller.empty_copy(), None)

    def replaced(self) -> None:
        """Another store, while the last request's copies may be on their way and no kernel waits for them."""
        experts = [self.random.randrange(EXPERTS)]
        self.cache.acquire(0, experts)
        self.cache.release(0, experts)
        tiered = isinstance(self.cache.store, PlayedTier)
        self.cache.replace_store(PlayedStore(self.cuda, set(range(LAYERS)) if tiered else {1, 2}))

    # Decided on the device

    def decided(self) -> None:
        decode = self.decode
        assert decode is not None
        ids = np.array([[self.random.sample(range(EXPERTS), TOP_K)] for _ in range(LAYERS)], np.int32)  # one token
        decode.take()
        waits = self.cuda.waits
        with decode.step(1, None):
            for layer in range(LAYERS):
                self.launch_layer(decode, layer, ids[layer])
        if self.cuda.waits != waits:
            self.cuda.fault("the host waits for the device in a step that the device decides")
        self.asked.append(ids)

    def launch_layer(self, decode: DeviceDecode, layer: int, ids: np.ndarray) -> None:
        """A layer of a step that the device decides; ids int32 `[tokens, top_k]`, -1: dropped."""
        chosen = self.cuda.device(torch.from_numpy(ids).clone())
        ahead = self.cuda.device(torch.from_numpy(np.array([self.random.sample(range(EXPERTS), TOP_K)])))
        row_of, _ = decode.experts(layer, Chosen(chosen), Predicted(ahead=ahead))
        self.launch_mapped(layer, ids[ids >= 0].tolist(), row_of)

    def launch_claim(
        self, claim: Callable[..., Any], state: Any, loads: Loads, layer: int, chosen: Chosen, routing: DeferredRouting,
        predicted: Predicted, *more: Any,
    ) -> torch.Tensor:  # fmt: skip
        given = [chosen.ids, predicted.ahead]
        names = ("slot_of", "quick", "slow", "wait", "best", "best_wait", "count", "scalars", "prefetched", "counters")
        writes = [*(getattr(state, name) for name in names), loads.entries, loads.counts, routing.ids[layer]]
        ids = self.cuda.device(torch.empty_like(chosen.ids))

        def run() -> None:
            ids.numpy()[:] = claim(state, loads, layer, chosen, routing, predicted, *more).numpy()

        self.cuda.launch(given, [*writes, ids], run, "claim")
        return ids

    def launch_fetch(self, fetch: Fetch, loads: Loads, kind: int) -> None:
        """Which slots it writes is known when it runs: what kernels find there shows whether that was in order."""
        store: Any = self.cache.store
        reads = [loads.entries[kind], loads.counts, *(records for _, records in store._layers.values())]
        self.cuda.launch(reads, [], lambda: fetch(loads, kind), "fetch")

    def launch_mapped(self, layer: int, experts: list[int], row_of: torch.Tensor) -> None:
        tensors = self.cache.pool(layer).tensors

        def run() -> None:
            for expert in experts:
                for name, tensor in tensors.items():
                    slot = int(row_of[expert])
                    if slot < 0 or tensor[slot].numpy().tobytes() != BYTES[layer][name][expert]:
                        self.cuda.fault("a kernel ran other weights than those of its experts")

        self.cuda.launch([row_of], [], run)

    def drain_finished(self) -> None:
        assert self.decode is not None
        for step in self.decode.routing.finished():
            self.cuda.touch(torch.from_numpy(step.ids))
            if step.ids.tolist() != self.asked.popleft().tolist():
                self.cuda.fault("the routing of another step was taken in")
        try:
            self.decode.count()
        except RuntimeError:  # of more experts than slots, which no step here has
            self.cuda.fault("counters of another step were taken in")


def faults(
    seed: int, plant: Callable[[pytest.MonkeyPatch], None] | None = None, seen: Counter | None = None
) -> list[str]:
    """What goes wrong in one schedule of a worker; `seen` counts what happened in it."""
    cuda = FakeCuda(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "threading", cuda.schedule)
        patch.setattr(transfer, "tile_bytes", lambda *_: 4096)
        patch.setattr(fetch_module, "PROGRAMS", 1)  # Triton's interpreter runs one after the other
        if plant is not None:
            plant(patch)
        cuda.install(patch)
        try:
            worker = Worker(cuda, seed)
            for _ in range(STEPS):
                worker.step()
            if seen is not None:
                seen.update(vars(worker.cache.update_stats()) | worker.seen)
            worker.cache.close()
            cuda.synchronize()
        except Stopped:
            pass
        finally:
            cuda.schedule.end()
    return cuda.faults


def assert_found(plant: Callable[[pytest.MonkeyPatch], None], *expected: str) -> None:
    """A fault that is planted is found, as all that is expected of it, before long."""
    seen: set[str] = set()
    for seed in range(PLANTED):
        seen.update(faults(seed, plant=plant))
        if seen.issuperset(expected):
            return
    pytest.fail(f"of {expected} only this was found: {seen}")


def test_every_schedule_is_in_order():
    seen: Counter = Counter()
    for seed in range(SCHEDULES):
        assert faults(seed, seen=seen) == [], f"seed {seed}"
    for what in (
        "fetched",
        "decided",
        "given back",
        "whole layers",
        "captured",
        "restarted",
        "replaced",
        "prefetch_hits",
        "late",
        "host_hits",
        "host_misses",
    ):
        assert seen[what] >= 20, f"{what}: {seen[what]}"


def test_an_event_that_is_published_before_it_is_recorded_is_found():
    def mark_used(pool: SlotPool) -> None:
        pool._used = torch.cuda.Event()
        pool._used.record()

    assert_found(
        lambda patch: patch.setattr(SlotPool, "mark_used", mark_used), "an event is waited for before it is recorded"
    )


def test_a_slot_that_is_overwritten_while_a_kernel_reads_it_is_found():
    assert_found(
        lambda patch: patch.setattr(SlotPool, "mark_used", lambda pool: None),
        "copy writes device memory that an unordered kernel reads",
        "copy writes device memory that an unordered fill writes",  # the zeros of a new pool
    )


def test_a_kernel_that_reads_a_slot_before_its_copy_has_ended_is_found():
    assert_found(
        lambda patch: patch.setattr(slots, "_wait", lambda event, nbytes: nbytes),
        "kernel reads device memory that an unordered copy writes",
        "a kernel ran other weights than those of its experts",
    )


def test_a_demand_load_that_a_kernel_does_not_wait_for_is_found():
    issue = DemandCopies.issue

    def beside(copies: DemandCopies, *args: Any, **options: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):  # which waits in the place of the kernels' stream
            issue(copies, *args, **options)

    assert_found(
        lambda patch: patch.setattr(DemandCopies, "issue", beside),
        "kernel reads device memory that an unordered copy writes",
        "a kernel ran other weights than those of its experts",
    )


def test_a_demand_load_into_a_slot_that_a_kernel_still_reads_is_found():
    def copy_whole(pool: SlotPool, slot: int, record: torch.Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):  # which was not held
            plain_copy(pool, slot, record)

    plain_copy = SlotPool.copy_whole
    assert_found(
        lambda patch: patch.setattr(SlotPool, "copy_whole", copy_whole),
        "copy writes device memory that an unordered kernel reads",
    )


def test_a_store_that_is_replaced_while_it_is_copied_from_is_found():
    assert_found(
        lambda patch: patch.setattr(DemandCopies, "finish", lambda copies, stats: None),
        "giving the store's memory back writes pinned memory that an unordered copy reads",
    )


def test_a_record_of_the_host_tier_that_is_overwritten_while_it_is_copied_from_is_found():
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(HostTier, "hold", lambda tier, key: tier._cell_of.get(key))
        patch.setattr(HostTier, "release", lambda tier, key: None)

    assert_found(
        plant,
        "the host writes pinned memory that an unordered copy reads",
    )


def test_a_record_of_the_host_tier_that_is_released_before_its_copy_has_ended_is_found():
    issue = DemandCopies.issue

    def early(copies: DemandCopies, pool: SlotPool, records: Any, stalls: bool, release: Callable[[], None]) -> None:
        issue(copies, pool, records, stalls, lambda: None)
        release()

    assert_found(
        lambda patch: patch.setattr(DemandCopies, "issue", early),
        "the host writes pinned memory that an unordered copy reads",
    )


def copies_of(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> tuple[DemandCopies, SlotPool, PlayedStore]:
    cuda.install(monkeypatch)
    store = PlayedStore(cuda, set())
    pool = SlotPool(store.layouts[0], 4, DEVICE)
    cuda.synchronize()
    return DemandCopies(DEVICE), pool, store


def test_an_idle_device_waits_for_a_whole_demand_load(monkeypatch):
    """And one with kernels to run waits for the rest; with loads for which the host waits it does not count."""
    cuda, stats = FakeCuda(0), CacheStats()
    copies, pool, store = copies_of(cuda, monkeypatch)
    record = store.page_locked((0, 1))
    assert record is not None
    released: list[str] = []
    copies.issue(pool, [(0, record)], stalls=True, release=lambda: released.append("first"))
    assert released == []
    cuda.synchronize()
    copies.count(stats)
    assert released == ["first"]
    assert stats.stall_seconds >= stats.fetch_seconds > 0
    stalled, fetched = stats.stall_seconds, stats.fetch_seconds
    copies.issue(pool, [(1, record)], stalls=False, release=lambda: None)
    cuda.synchronize()
    copies.count(stats)
    assert stats.stall_seconds == stalled and stats.fetch_seconds > fetched
    for _ in range(50):
        cuda.launch([], [])
    copies.issue(pool, [(2, record)], stalls=True, release=lambda: None)
    while cuda.streams[0].done < cuda.streams[0].given - 1:  # its kernels, not the wait
        cuda.advance()
    copies.finish(stats)
    cuda.synchronize()
    copies.count(stats)
    assert stats.stall_seconds - stalled < 50 / 1e3 and not cuda.faults


def test_prefetches_wait_for_demand_loads(monkeypatch):
    cuda = FakeCuda(1)
    copies, pool, store = copies_of(cuda, monkeypatch)
    record = store.page_locked((0, 1))
    assert record is not None
    copies.issue(pool, [(0, record)], stalls=True, release=lambda: None)
    ended = copies.ended
    assert ended is not None
    for _ in pool.copy(1, record, 4096, lambda: copies.ended):
        assert ended.query()
    assert not cuda.faults


def test_a_staging_buffer_that_is_used_again_too_early_is_found():
    def fill(pool: SlotPool, slot: int, read: Any) -> Any:
        staging = pool._staging.pop() if pool._staging else aligned_empty(pool.layout.nbytes, pin=True)
        yield from read([staging[p.offset : p.offset + p.nbytes] for p in pool.layout.pieces])
        pool._staging.append(staging)
        yield from pool.copy(slot, staging, pool.layout.nbytes)

    assert_found(
        lambda patch: patch.setattr(SlotPool, "fill", fill),
        "the host writes pinned memory that an unordered copy reads",
    )


def test_a_call_of_another_thread_during_a_capture_is_found():
    assert_found(
        lambda patch: patch.setattr(ExpertCacheManager, "quiet", lambda cache: nullcontext()),
        "a call from another thread during a capture (cudaEventSynchronize)",
        "a call from another thread during a capture (cudaMemcpyAsync)",
    )


def test_prefetches_that_the_next_layer_does_not_wait_for_are_found():
    assert_found(
        lambda patch: patch.setattr(DeviceDecode, "_join", lambda decode: None),
        "a kernel ran other weights than those of its experts",
        "claim writes device memory that an unordered fetch reads",
    )


def test_prefetches_that_begin_before_they_are_decided_are_found():
    def prefetch(decode: DeviceDecode, fetch: Any) -> None:
        assert decode._side is not None
        with torch.cuda.stream(decode._side):
            fetch(decode._loads, 1)
        decode._prefetching = True

    assert_found(
        lambda patch: patch.setattr(DeviceDecode, "_prefetch", prefetch),
        "fetch reads device memory that an unordered claim writes",
    )


def test_routing_that_is_read_before_it_has_arrived_is_found():
    assert_found(
        lambda patch: patch.setattr(HostCopy, "arrived", True),
        "the host reads pinned memory that an unordered copy writes",
        "the routing of another step was taken in",
    )


def test_a_store_that_goes_before_the_last_kernel_has_read_it_is_found():
    def close(cache: ExpertCacheManager) -> None:
        cache.transfers.close()
        cache.store.close()

    assert_found(
        lambda patch: patch.setattr(ExpertCacheManager, "close", close),
        "giving the store's memory back writes pinned memory that an unordered fetch reads",
    )


def test_an_error_of_a_copy_ends_the_worker_with_that_error():
    """CUDA's errors stay: every later wait for the stream meets it again."""
    synchronize = Event.synchronize

    def broken(event: Event) -> None:
        synchronize(event)
        if event.cuda.schedule.running is not event.cuda.schedule.tasks[0]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    ended = 0
    for seed in range(40):
        try:
            assert faults(seed, lambda patch: patch.setattr(Event, "synchronize", broken)) == []
        except torch.AcceleratorError:
            ended += 1
    assert ended >= 30, "all but those whose readers copied nothing before the end"


def test_streams_are_used_again():
    """PyTorch has 32 of them for a device: beyond that, copies would share a stream with the model's kernels."""
    cuda = FakeCuda(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "threading", cuda.schedule)
        cuda.install(patch)
        worker = Worker(cuda, 0)
        for _ in range(40):
            worker.fetched()
            worker.restarted()
        worker.cache.close()
        cuda.schedule.end()
    threads = worker.cache.readers + 1  # the thread that asks copies too
    assert len(cuda.streams) <= 1 + len(worker.cache.pools) * threads and cuda.faults == []


def test_the_last_staging_buffer_may_be_taken_by_another_thread(monkeypatch):
    cuda = FakeCuda(0)
    cuda.install(monkeypatch)
    store = PlayedStore(cuda, {0})
    pool = SlotPool(store.layouts[0], 2, DEVICE)
    pool._staging = Contended([aligned_empty(pool.layout.nbytes, pin=True)])
    moved = sum(pool.fill(1, lambda buffers: store.read_tiles((0, 3), buffers, 4096)))
    assert moved == sum(piece.nbytes for piece in pool.layout.pieces) and cuda.faults == []
    assert torch.equal(pool.tensors[DOWN][1], WEIGHTS[0][DOWN][3])
