"""The manager keeps slots, maps and weights in step, on real stores."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.entries import entries, use_pool
from tests.store.test_stores import layer, pack
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.transfer import READERS, CacheClosed, LinkLimit, TransferEngine
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import State
from vllm_adapmoe.policy.eviction import LRU, NextUse
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.policy.residency import Residency
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import as_bytes

LAYERS = [layer(number, experts=6) for number in range(3)] + [layer(9, experts=4, odd=True)]
POOL_OF = [0, 0, 0, 1]


def host_store() -> HostStore:
    store = HostStore(torch.device("cpu"))
    for index, tensors in enumerate(LAYERS):
        store.put_layer(index, tensors)
    return store.seal()


def manager(store: Any, slots: list[int], readers: int = READERS, **options: Any) -> ExpertCacheManager:
    experts = [store.num_experts(layer) for layer in range(store.num_layers)]
    shape = CacheShape(experts, 2, POOL_OF, [layout.nbytes for layout in store.layouts])
    controller = CacheController(shape, CacheSetup(slots, **options))
    return ExpertCacheManager(store, controller, torch.device("cpu"), readers)


def assert_served(cache: ExpertCacheManager, index: int, experts: list[int]) -> None:
    slot_map = cache.acquire(index, experts)
    assert slot_map.dtype == torch.int32
    slots = slot_map[experts].tolist()
    assert len(set(slots)) == len(experts) and min(slots) >= 0
    for name, tensor in cache.pool(index).tensors.items():
        assert tensor.shape == (cache.pool(index).num_slots, *LAYERS[index][name].shape[1:])
        assert torch.equal(as_bytes(tensor[slots]), as_bytes(LAYERS[index][name][experts]))
    cache.release(index, experts)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1, max_size=3)), max_size=40),
    st.sampled_from([[3, 3], [7, 4], [18, 3]]),
)
@settings(max_examples=50, deadline=None)
def test_every_acquired_expert_is_in_its_slot(requests, slots):
    cache = manager(host_store(), slots)
    for index, experts in requests:
        assert_served(cache, index, sorted(experts))
    stats = cache.stats
    assert stats.hits + stats.misses == sum(len(experts) for _, experts in requests)
    assert cache.num_slots == sum(slots) and cache.num_resident <= sum(slots)
    # A slot belongs to one expert, and the maps name exactly what is resident.
    for pool in (0, 1):
        mapped = [slot for index in range(4) if POOL_OF[index] == pool for slot in cache.slot_maps[index].tolist()]
        resident = [slot for slot in mapped if slot >= 0]
        assert len(set(resident)) == len(resident) == len(entries(cache.controller.pools[pool]))
    cache.close()


def test_a_damaged_record_is_never_served(tmp_path: Path):
    path = tmp_path / "experts.pack"
    store = pack(path, LAYERS)
    offset = store._index.offsets[1] + 2 * store.layouts[1].nbytes + 10  # expert 2 of layer 1
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    cache = manager(store, [18, 4])
    assert_served(cache, 1, [0, 1])
    with pytest.raises(StoreError, match="expert 2 of MoE layer 1 is damaged"):
        cache.acquire(1, [1, 2, 3])
    assert cache.slot_maps[1].tolist()[2] == -1
    assert_served(cache, 1, [1, 3])
    assert_served(cache, 0, [0, 1, 2, 3, 4, 5])
    cache.close()


class Flaky:
    """A store whose disk fails now and then, and takes its time."""

    def __init__(self, store: Any, fails: Callable[[], bool]) -> None:
        self.store, self.fails = store, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
        for nbytes in self.store.read_tiles(key, into, 4096):
            time.sleep(0.0002)
            if self.fails():
                raise StoreError(f"expert {key} cannot be read")
            yield nbytes


@pytest.mark.parametrize("failures", [0.0, 0.05])
def test_threads(tmp_path, failures):
    """Demand and speculation at once, with wrong predictions and read errors: right weights, and every byte counted."""
    store = Flaky(pack(tmp_path / "experts.pack", LAYERS), lambda: generator.random() < failures)
    generator = random.Random(5)
    cache = manager(store, [9, 4], eviction="next_use", lookahead=2, max_experts=2)
    use_pool(cache, 0, Residency(9, 2, NextUse(4, 6)))
    failed = 0
    for number in range(400):
        index = number % 3
        experts = sorted(generator.sample(range(6), generator.randint(1, 4)))
        ids = np.array([experts[:2] if len(experts) > 1 else [experts[0], (experts[0] + 1) % 6]])
        predicted = {
            distance: PredictedExperts(np.array([generator.sample(range(6), 2)]), np.ones((1, 2), dtype=bool))
            for distance in (1, 2)
            if index + distance < 3
        }
        acquisition = cache.begin(index, experts)
        cache.prefetch(index, (ids, np.ones(ids.shape, dtype=bool)), predicted.get)
        try:
            slot_map = cache.wait(acquisition)
        except StoreError:
            failed += 1
            continue
        slots = slot_map[experts]
        for name, tensor in cache.pool(index).tensors.items():
            assert torch.equal(as_bytes(tensor[slots]), as_bytes(LAYERS[index][name][experts]))
        if number % 5 == 0:
            time.sleep(0.002)
        cache.release(index, experts)
    assert (failed > 0) == (failures > 0)
    stats = cache.stats
    assert stats.prefetches > 5 and stats.prefetch_hits + stats.late > 0
    cache.close()
    assert not any(thread.is_alive() for thread in cache.transfers.threads)
    record = store.layouts[0].nbytes
    assert stats.wasted_bytes < stats.fetched_bytes
    if not failures:
        assert stats.fetched_bytes >= (stats.misses - stats.late) * record


def test_closing_while_loading(tmp_path):
    store = Flaky(pack(tmp_path / "experts.pack", LAYERS), lambda: False)
    cache = manager(store, [9, 4], lookahead=2, max_experts=2)
    use_pool(cache, 0, Residency(9, 2, LRU(4, 6)))
    cache.prefetch(0, None, {1: PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))}.get)
    cache.close()
    cache.close()
    assert not any(thread.is_alive() for thread in cache.transfers.threads)


def aside(function: Callable[..., Any], *args: Any) -> Future:
    """In a thread that may wait for ever without keeping the test from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_closing_while_a_layer_waits(tmp_path):
    """Of six loads one reader and the layer have two in hand; the others were taken by nobody."""
    begun = threading.Event()
    store = Flaky(pack(tmp_path / "experts.pack", LAYERS), lambda: begun.set() or False)
    cache = manager(store, [18, 4], readers=1)
    waits = aside(cache.acquire, 0, [0, 1, 2, 3, 4, 5])
    assert begun.wait(10)
    cache.close()
    with pytest.raises(CacheClosed):
        waits.result(10)
    assert not cache.transfers.jobs and not cache.transfers.errors
    with pytest.raises(CacheClosed):
        cache.acquire(0, [0])


def test_a_cancelled_load_that_is_asked_for_after_all():
    """Its reader stands within a tile all the while."""
    reached, go_on = threading.Event(), threading.Event()

    class Stopped(Flaky):
        def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
            for nbytes in self.store.read_tiles(key, into, 4096):
                if key == (1, 0):
                    reached.set()
                    assert go_on.wait(10)
                yield nbytes

    cache = manager(Stopped(host_store(), lambda: False), [9, 4], readers=1, lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))
    cache.prefetch(0, None, {1: PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))}.get)
    assert reached.wait(10)
    assert_served(cache, 1, [3])
    assert cache.controller.pools[0].entries[1, 0].cancelled
    served = aside(assert_served, cache, 1, [0, 3])
    while cache.stats.late == 0:
        time.sleep(0.001)
    go_on.set()
    served.result(10)
    assert cache.stats.misses == 2 and cache.stats.wasted_bytes == 0
    cache.close()


def test_a_wasted_prefetch_wastes_what_it_moved():
    """Records of host memory move without their padding."""
    cache = manager(host_store(), [18, 4])
    use_pool(cache, 1, Residency(4, 1, LRU(4, 6)))
    controller, moved = cache.controller, sum(piece.nbytes for piece in cache.store.layouts[3].pieces)
    assert moved < cache.store.layouts[3].nbytes
    for expert in (0, 1):
        with cache.transfers.lock:
            assert controller.residency(3).request_prefetch((3, expert))
            cache.transfers.speculate([(3, expert)])
        while controller.residency(3).state((3, expert)) is not State.STAGED:
            time.sleep(0.001)
        cache.acquire(3, [2])  # the prefetch was wrong: the next one takes its slot
        cache.release(3, [2])
    assert cache.stats.fetched_bytes == 3 * moved
    assert cache.stats.wasted_bytes == moved
    cache.close()


def test_speculation_yields_to_demand(tmp_path):
    """One reader, at work on a prefetch of many tiles: demand is served after one of them."""
    order: list[Any] = []

    class Slow(Flaky):
        def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
            for nbytes in self.store.read_tiles(key, into, 4096):
                time.sleep(0.01)
                order.append(key)
                yield nbytes

    cache = manager(Slow(host_store(), lambda: False), [9, 4], readers=1, lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))
    cache.prefetch(0, None, {1: PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))}.get)
    while not order:
        time.sleep(0.001)
    cache.acquire(0, [3])
    assert (1, 0) in order and order.count((1, 0)) < order.count((0, 3))
    cache.release(0, [3])
    assert_served(cache, 1, [0])
    assert cache.stats.late + cache.stats.prefetch_hits == 1
    cache.close()


def test_what_is_there_does_not_wait_for_the_rest():
    """Of four experts two are resident and two arrive from a slow store."""
    cache = manager(Flaky(host_store(), lambda: False), [9, 4], readers=1)
    assert_served(cache, 0, [1, 4])
    seen = []
    for arrived in cache.arrivals(cache.begin(0, [0, 1, 3, 4])):
        seen.append(arrived.tolist())
        slots = cache.slot_maps[0][arrived]
        for name, tensor in cache.pool(0).tensors.items():
            assert torch.equal(as_bytes(tensor[slots]), as_bytes(LAYERS[0][name][arrived])), "named before it was there"
    assert seen[0] == [1, 4] and sorted(expert for arrived in seen[1:] for expert in arrived) == [0, 3]
    cache.release(0, [0, 1, 3, 4])
    assert_served(cache, 0, [0, 1, 3, 4])
    cache.close()


def test_a_late_waker_does_not_hold_up_the_link():
    link = LinkLimit(100)
    assert link.reserve(50, ready=1.0) == pytest.approx(1.5)
    assert link.reserve(50, ready=1.2) == pytest.approx(2.0), "ready while the link was busy: goes on at once"
    assert link.reserve(50, ready=3.0) == pytest.approx(3.5), "the link was idle"


def test_readers_run_where_they_may():
    """A thread inherits the cores of the one that makes it, which may be bound to one."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:1])
    try:
        experts = [1] * 3
        controller = CacheController(CacheShape(experts, 1, [0] * 3, [1] * 3), CacheSetup([2]))
        engine = TransferEngine(controller, [], host_store(), readers=2, cpus=allowed)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = [sorted(os.sched_getaffinity(thread.native_id)) for thread in engine.threads]
            if found == [allowed] * 2:
                break
        engine.close()
        assert found == [allowed] * 2
    finally:
        os.sched_setaffinity(0, allowed)


class Broken(Flaky):
    """A store of some experts, whose other copies meet an error of CUDA."""

    def __init__(self, store: Any, fails: Callable[[Any], bool], ends_badly: bool = False) -> None:
        super().__init__(store, lambda: False)
        self.fails_for, self.ends_badly = fails, ends_badly

    def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
        if not self.fails_for(key):
            yield from self.store.read_tiles(key, into, tile_bytes)
            return
        if not self.ends_badly:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        try:
            for nbytes in self.store.read_tiles(key, into, 4096):
                time.sleep(0.01)
                yield nbytes
        except GeneratorExit:  # a copy that was under way
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered") from None


def assert_broken(cache: ExpertCacheManager) -> None:
    """Whoever asks the cache for anything is told, and it can be closed."""

    def within(context: Any) -> None:
        with context:
            pass

    for ask in (
        lambda: cache.acquire(0, [0]),
        lambda: within(cache.whole_layer(0)),
        lambda: within(cache.quiet()),
        lambda: cache.record_whole([]),
        lambda: cache.lend(),
        lambda: cache.prefetch(0, None, {}.get),
        lambda: cache.prefetch_first_layers(0, ()),
    ):
        with pytest.raises(torch.AcceleratorError, match="an illegal memory access"):
            ask()
    cache.close()
    assert not any(thread.is_alive() for thread in cache.transfers.threads)


def prefetch(cache: ExpertCacheManager) -> None:
    cache.prefetch(0, None, {1: PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))}.get)


@pytest.mark.parametrize("readers", [0, 2])
def test_an_error_of_cuda_in_a_demand_load_ends_everything(readers):
    cache = manager(Broken(host_store(), lambda key: key == (0, 3)), [18, 4], readers)
    with pytest.raises(torch.AcceleratorError, match="an illegal memory access"):
        cache.acquire(0, [1, 2, 3])
    assert_broken(cache)


def test_an_error_of_cuda_in_a_prefetch_ends_everything():
    cache = manager(Broken(host_store(), lambda key: key[0] == 1), [9, 4], lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))
    prefetch(cache)
    while not cache.transfers.fatal:
        time.sleep(0.001)
    assert_broken(cache)


def test_an_error_of_cuda_while_a_prefetch_is_given_up_ends_everything():
    """It used to end the reader, and who waited for it waited for ever."""
    cache = manager(Broken(host_store(), lambda key: key[0] == 1, True), [9, 4], 1, lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))
    prefetch(cache)
    while not cache.transfers.jobs:
        time.sleep(0.001)
    with pytest.raises(torch.AcceleratorError, match="an illegal memory access"):
        aside(cache.acquire, 1, [3, 4]).result(10)
    assert_broken(cache)


def test_an_error_of_the_readers_own_ends_everything():
    """Not of a load: it used to end the reader in silence."""
    cache = manager(host_store(), [9, 4], lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))

    def start_speculation(key: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    cache.controller.start_speculation = start_speculation
    prefetch(cache)
    while not cache.transfers.fatal:
        time.sleep(0.001)
    assert_broken(cache)


def test_a_prefetch_that_cannot_be_read_is_dropped(caplog):
    cache = manager(Flaky(host_store(), lambda: True), [9, 4], lookahead=1, max_experts=1)
    use_pool(cache, 0, Residency(9, 1, LRU(4, 6)))
    prefetch(cache)
    while "a prefetch failed and is dropped" not in caplog.text:
        time.sleep(0.001)
    with pytest.raises(StoreError, match="cannot be read"):
        cache.acquire(0, [0])
    cache.close()


def test_nothing_moves_while_it_is_quiet():
    """What has begun ends first; what is asked for meanwhile begins afterwards, and may not be waited for."""
    moving: list[Any] = []

    class Slow(Flaky):
        def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
            for nbytes in self.store.read_tiles(key, into, 4096):
                moving.append(key)
                time.sleep(0.002)
                yield nbytes

    cache = manager(Slow(host_store(), lambda: False), [9, 4], lookahead=1, max_experts=2)
    use_pool(cache, 0, Residency(9, 3, LRU(4, 6)))
    prefetch(cache)
    while not moving or cache.transfers.speculative:  # what is still queued would keep the planner from predicting
        time.sleep(0.001)
    with cache.quiet():
        assert not cache.transfers.jobs and cache.stats.prefetches > 0 and cache.stats.fetched_bytes > 0
        before = len(moving)
        cache.prefetch(0, None, {1: PredictedExperts(np.array([[4, 5]]), np.ones((1, 2), dtype=bool))}.get)
        for ask in (
            lambda: cache.acquire(1, [0]),
            lambda: cache.lend(),
            lambda: cache.quiet().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                ask()
        time.sleep(0.05)
        assert len(moving) == before and not cache.transfers.jobs
    while not {(1, 4), (1, 5)} & set(moving):
        time.sleep(0.001)
    assert_served(cache, 1, [0, 1])
    cache.close()


def test_an_error_while_it_is_quiet_ends_that():
    cache = manager(host_store(), [9, 4])
    with pytest.raises(ValueError, match="capture"), cache.quiet():
        raise ValueError("capture")
    assert_served(cache, 0, [0, 1])
    cache.close()


def test_link_limit(tmp_path):
    """Every byte passes the link once, and no sooner than at the rate asked for."""

    class Counted(LinkLimit):
        def reserve(self, nbytes: int, ready: float) -> float:
            reserved.append(nbytes)
            return super().reserve(nbytes, ready)

    reserved: list[int] = []
    store = host_store()
    record = store.layouts[0].nbytes
    cache = manager(store, [18, 4])
    cache.transfers.link = Counted(18 * record / 0.6)
    start = time.perf_counter()
    for index in range(3):
        assert_served(cache, index, [0, 1, 2, 3, 4, 5])
    assert time.perf_counter() - start >= 0.6
    assert sum(reserved) == cache.stats.fetched_bytes == pytest.approx(18 * record, rel=0.01)
    cache.close()


def test_time_is_counted_while_something_is_under_way(tmp_path):
    """`fetched_bytes` over `fetch_seconds` is the bandwidth: no time between events, none twice for two at once."""

    class Slow(Flaky):
        def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Iterator[int]:
            time.sleep(0.05)
            yield from self.store.read_tiles(key, into, tile_bytes)

    cache = manager(Slow(host_store(), lambda: False), [18, 4])
    start = time.perf_counter()
    for index in range(2):
        assert_served(cache, index, [0, 1])
    elapsed = time.perf_counter() - start
    time.sleep(0.2)
    assert 0.1 <= cache.stats.fetch_seconds <= elapsed
    assert_served(cache, 0, [0, 1])
    assert cache.stats.fetch_seconds <= elapsed
    cache.close()
