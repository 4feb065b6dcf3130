"""Decode steps of the GPU and steps of the host in turns: the real cache and kernels, Triton's in its interpreter."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import fetch
from vllm_adapmoe.device.decode import DeviceDecode, max_tokens, record_addresses
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.store.base import ExpertsUnavailable, StoreError
from vllm_adapmoe.store.host import HostStore

LAYERS, EXPERTS, TOP_K = 3, 6, 2
CPU = torch.device("cpu")
POOL_OF = [0, 0, 1]
SHAPES = [(8,), (8,), (5,)]
"""Of the weights of each layer's experts, whose bytes say which they are."""


class FailingStore(HostStore):
    """Host memory, some of whose records cannot be read by the host: an error of a disk, as far as a cache sees."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.failing: set[tuple[int, int]] = set()
        for layer, shape in enumerate(SHAPES):
            marks = torch.arange(EXPERTS, dtype=torch.uint8) + 10 * (layer + 1)
            self.put_layer(layer, {"weights": marks.view(-1, 1).expand(EXPERTS, *shape).contiguous()})
        self.seal()

    def read_tiles(self, key: Any, into: Any, tile_bytes: int) -> Any:
        if key in self.failing:
            raise StoreError(f"expert {key} cannot be read")
        return super().read_tiles(key, into, tile_bytes)


def open_cache(slots: list[int], max_experts: int = 2, eviction: str = "next_use") -> ExpertCacheManager:
    store = FailingStore()
    shape = CacheShape([EXPERTS] * LAYERS, TOP_K, POOL_OF, [layout.nbytes for layout in store.layouts])
    setup = CacheSetup(slots, eviction, lookahead=1, max_experts=max_experts)
    return ExpertCacheManager(store, CacheController(shape, setup), CPU, readers=0)


def run_step(decode: DeviceDecode, ids: np.ndarray, ahead: np.ndarray | None = None) -> None:
    """A step of the GPU; ids `[layers, tokens, top_k]`. Checks that each layer's experts are in their slots."""
    with decode.step(ids.shape[1], "payload"):
        for layer in range(LAYERS):
            chosen = torch.from_numpy(np.ascontiguousarray(ids[layer], np.int32))
            guessed = None if ahead is None else torch.from_numpy(np.ascontiguousarray(ahead[layer]))
            row_of, _ = decode.experts(layer, Chosen(chosen), Predicted(ahead=guessed))
            check_slots(decode.cache, layer, row_of, ids[layer])


def check_slots(cache: ExpertCacheManager, layer: int, row_of: torch.Tensor, ids: np.ndarray) -> None:
    assert row_of.shape == (EXPERTS + 1,) and row_of[-1] == -1
    (slots,) = cache.pool(layer).tensors.values()
    for expert in np.unique(ids[ids >= 0]).tolist():
        assert (slots[int(row_of[expert])] == expert + 10 * (layer + 1)).all(), "its own weights"


class HostAndGpu(RuleBasedStateMachine):
    """Any sequence of both kinds of steps, reads that fail included: no expert is lost, or in two slots."""

    @initialize(slots=st.tuples(st.integers(6, 12), st.integers(6, 7)), eviction=st.sampled_from(["lru", "next_use"]))
    def start(self, slots, eviction):
        self.cache = open_cache(list(slots), eviction=eviction)
        self.decode = DeviceDecode(self.cache, TOP_K, 2, CPU)
        self.requested = 0

    @rule(seed=st.integers(0, 1 << 16), tokens=st.integers(1, 3), prefetches=st.booleans())
    def gpu_step(self, seed, tokens, prefetches):
        chance = np.random.default_rng(seed)
        ids = chance.integers(-1, EXPERTS, (LAYERS, tokens, TOP_K))
        run_step(self.decode, ids, chance.integers(0, EXPERTS, (LAYERS, tokens, TOP_K)) if prefetches else None)
        self.requested += sum(len(np.unique(layer[layer >= 0])) for layer in ids)

    @rule(seed=st.integers(0, 1 << 16), fails=st.booleans())
    def host_step(self, seed, fails):
        self.decode.give_back()
        chance = np.random.default_rng(seed)
        store: Any = self.cache.store
        store.failing = {(int(chance.integers(LAYERS)), int(chance.integers(EXPERTS)))} if fails else set()
        for layer in range(LAYERS):
            experts = np.sort(chance.permutation(EXPERTS)[: chance.integers(1, EXPERTS)])
            self.requested += len(experts)
            try:
                acquisition = self.cache.begin(layer, experts)
                if self.cache.controller.planner is not None:  # there are slots for prefetches
                    predicted = PredictedExperts(chance.integers(0, EXPERTS, (4, TOP_K)), np.ones((4, TOP_K), bool))
                    self.cache.prefetch(layer, None, {1: predicted}.get)
                slots = self.cache.wait(acquisition)
            except ExpertsUnavailable:
                continue
            check_slots(self.cache, layer, torch.cat((slots, torch.tensor([-1]))), experts)
            self.cache.release(layer, experts)

    @invariant()
    def holds_each_expert_once(self):
        if not hasattr(self, "cache"):
            return
        if self.decode.owns:
            self.decode.count()
            states = [(pool.download().slots, pool.download().free) for pool in self.decode.pools]
        else:
            pools = self.cache.controller.pools
            states = [(pool.slots, [*pool.free, *(entry.slot for entry in pool.entries.values() if entry.slot >= 0)])
                      for pool in pools]  # fmt: skip
        for index, (slots, free) in enumerate(states):
            used = slots[slots >= 0].tolist()
            assert sorted([*used, *free]) == list(range(self.cache.pools[index].num_slots))
            for layer in np.flatnonzero(np.array(POOL_OF) != index):
                assert (slots[layer] < 0).all(), "experts are in their own pool"
        stats = self.cache.stats
        assert stats.hits + stats.misses == self.requested
        assert self.cache.num_resident <= self.cache.num_slots

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()


TestHostAndGpu = HostAndGpu.TestCase
TestHostAndGpu.settings = settings(
    max_examples=20,
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "PROGRAMS", 1)
        yield


def test_a_replay_counts_what_the_gpu_counts():
    """The worker's counters and slots, prefetches included, from the routing and the predictions alone."""
    cache = open_cache([8, 6])
    decode = DeviceDecode(cache, TOP_K, 2, CPU)
    alone = CacheController(cache.controller.shape, CacheSetup([8, 6], "next_use", max_experts=2))
    chance = np.random.default_rng(5)
    for _ in range(20):
        ids, ahead = chance.integers(0, EXPERTS, (2, LAYERS, 2, TOP_K))
        run_step(decode, ids, ahead)
        for layer in range(LAYERS):
            votes = np.bincount(ahead[layer].ravel(), minlength=EXPERTS) if layer + 1 < LAYERS else None
            alone.decide_on_device(layer, np.unique(ids[layer]), None, votes)
    decode.count()
    ours, replayed = vars(cache.stats), vars(alone.stats)
    moved = {"fetched_bytes", "wasted_bytes"}  # a worker does not move the padding of records
    assert ours["stall_seconds"] == 0, "no fetch of the host tells how long one takes"
    assert {name: ours[name] for name in ours.keys() - moved} == {name: replayed[name] for name in ours.keys() - moved}
    assert ours["prefetch_hits"] > 0 and ours["prefetches_wasted"] > 0
    assert (
        cache.stats.fetched_bytes
        == sum((cache.controller.layer_misses[layer]) * SHAPES[layer][0] for layer in range(LAYERS))
        + ours["prefetches"] * SHAPES[0][0]
    ), "the second pool has one layer, for which nothing is prefetched"
    for pool, residency in zip(decode.pools, alone.pools, strict=True):
        assert np.array_equal(pool.download().slots, residency.slots)
    cache.close()


def test_two_ranks_have_the_same_slots():
    """Decisions depend on routing alone: not on time, nor on what was resident before in another process."""
    chance = np.random.default_rng(7)
    caches = [open_cache([7, 6]) for _ in range(2)]
    ranks = [DeviceDecode(cache, TOP_K, 2, CPU) for cache in caches]
    for _ in range(10):
        ids, ahead = chance.integers(0, EXPERTS, (2, LAYERS, 1, TOP_K))
        for rank in ranks:
            run_step(rank, ids, ahead)
    first, second = ([pool.slot_of.tolist() for pool in rank.pools] for rank in ranks)
    assert first == second
    for cache in caches:
        cache.close()


def test_prefetches_are_judged_after_the_cache_is_handed_back():
    """One that the host uses is a hit, one that it evicts wasted, one that the GPU gets back is judged there."""
    cache = open_cache([10, 6])
    decode = DeviceDecode(cache, TOP_K, 3, CPU)
    ahead = np.array([[[1, 2]], [[-1, -1]], [[-1, -1]]])
    run_step(decode, np.array([[[0, 1]], [[0, 3]], [[0, 1]]]), ahead)
    decode.give_back()
    assert (cache.stats.prefetches, cache.stats.prefetch_hits, cache.stats.prefetches_wasted) == (2, 0, 0)
    cache.acquire(1, [1])
    cache.release(1, [1])
    assert (cache.stats.prefetch_hits, cache.stats.prefetches_wasted) == (1, 0)
    run_step(decode, np.array([[[0, 1]], [[2, 3]], [[0, 1]]]))
    decode.give_back()
    assert (cache.stats.prefetch_hits, cache.stats.prefetches_wasted) == (2, 0)
    cache.acquire(1, [1, 2])
    cache.release(1, [1, 2])
    assert cache.stats.prefetch_hits == 2, "each once"
    run_step(decode, np.array([[[0, 1]], [[0, 3]], [[0, 1]]]), np.array([[[4, 5]], [[-1, -1]], [[-1, -1]]]))
    decode.give_back()
    for experts in ([0, 1, 2], [3, 4, 5]):  # all slots of the pool
        cache.acquire(0, experts)
        cache.release(0, experts)
    cache.acquire(1, [0, 1, 2, 3])
    cache.release(1, [0, 1, 2, 3])
    assert cache.stats.prefetches == 4 and cache.stats.prefetches_wasted == 2
    cache.close()


def test_a_prefetch_of_the_gpu_that_is_evicted_for_one_in_flight_is_wasted():
    """The host requests an expert that it is prefetching; for the slot that this has taken, another has to go."""
    shape = CacheShape([4] * 4, 1, [0] * 4, [1] * 4)
    controller = CacheController(shape, CacheSetup([10], "lru", lookahead=1, max_experts=1))
    (pool,) = controller.pools

    def use(key: tuple[int, int]) -> None:
        for load in controller.begin(key[0], [key[1]]).loads:
            controller.transfer_ended(load.key, 1, True)
        controller.release(key[0], [key[1]])

    controller.lend()
    controller.decide_on_device(0, [0], None, np.array([1, 0, 0, 0]))
    controller.take_back()
    unused, in_flight = (1, 0), (3, 3)
    others = [(layer, expert) for layer in (0, 2, 3) for expert in range(4)][: pool.capacity - 1]
    for key in others + others:
        use(key)
    assert pool.residents == pool.capacity and not pool.holds(in_flight) and pool.holds(unused)
    pool.request_prefetch(in_flight)
    controller.start_speculation(in_flight)
    (awaited,) = controller.begin(3, [3]).awaited
    assert awaited.evicted == unused and controller.stats.prefetches_wasted == 1 and unused not in controller.staged
    controller.transfer_ended(in_flight, 1, True)
    controller.release(3, [3])
    pool.request_prefetch(unused)
    controller.start_speculation(unused)
    controller.transfer_ended(unused, 1, True)
    controller.begin(1, [0])
    assert controller.stats.prefetch_hits == 1


def test_the_host_may_request_nothing_while_the_gpu_decides():
    """And prefetches nothing: what is queued meanwhile would be lost in the GPU's answer."""
    cache = open_cache([10, 6])
    decode = DeviceDecode(cache, TOP_K, 0, CPU)
    decode.take()
    certain = PredictedExperts(np.array([[4, 5]] * 8), np.ones((8, 2), dtype=bool))
    cache.prefetch(-1, None, {1: certain}.get)
    cache.prefetch_first_layers(1000, ())
    assert not cache.controller.pools[0].entries
    with pytest.raises(RuntimeError, match="the GPU decides"):
        cache.acquire(0, [1])
    decode.give_back()
    decode.give_back()
    cache.acquire(0, [1])
    cache.release(0, [1])
    cache.close()


def test_warm_up_loads_and_counts_nothing():
    cache = open_cache([8, 6])
    decode = DeviceDecode(cache, TOP_K, 2, CPU)
    unused = [pool.policy.wait.copy() for pool in cache.controller.pools]
    with decode.warm_up():
        everyone = Chosen(torch.arange(EXPERTS).view(-1, TOP_K))
        for layer in range(LAYERS):  # of a step without requests, whose rows are all padding
            _, ids = decode.experts(layer, everyone, Predicted(ahead=everyone.ids))
            assert ids.eq(EXPERTS).all()
    assert not decode.owns and not any(vars(cache.stats).values()) and cache.num_resident == 0
    for pool, wait in zip(cache.controller.pools, unused, strict=True):
        assert np.array_equal(pool.caught_up().wait, wait), "as if nothing had been used"
    cache.close()


def test_experts_without_a_slot_end_the_engine():
    """Which `max_tokens` prevents: nothing is written where no slot is, and the host is told."""
    cache = open_cache([4, 6], 0)
    decode = DeviceDecode(cache, TOP_K, 0, CPU)
    (slots,) = cache.pool(0).tensors.values()
    decode.take()
    decode.routing.begin_step(EXPERTS)
    decode.experts(0, Chosen(torch.arange(EXPERTS).view(-1, TOP_K)), None)
    assert sorted(slots[:, 0].tolist()) == [10, 11, 12, 13], "experts of the first layer, and nothing else"
    decode._copy_counters()
    with pytest.raises(RuntimeError, match="more experts of pool 0 than it has slots"):
        decode.count()
    cache.close()


def test_slots_that_were_given_up_make_steps_smaller():
    cache = open_cache([12, 6], 0)
    decode = DeviceDecode(cache, TOP_K, 0, CPU)
    assert decode.max_tokens == 64
    shape = cache.controller.shape
    cache.resize(CacheController(shape, CacheSetup([4, 6], "next_use")), None)
    decode.rebuild()
    assert decode.max_tokens == 2
    run_step(decode, np.array([[[0, 1], [2, 3]]] * LAYERS))
    cache.close()


def test_steps_are_as_large_as_the_slots_allow():
    for slots, expected in (([6, 6], 64), ([5, 6], 2), ([3, 2], 1), ([6, 1], 0)):
        cache = open_cache(slots, 0)
        assert max_tokens(cache, TOP_K) == expected
        cache.close()


def test_a_store_that_is_not_page_locked_is_refused():
    store = FailingStore()
    store._refusals[1] = "no"
    with pytest.raises(ValueError, match="expert 0 of MoE layer 1 is not in page-locked memory"):
        record_addresses(store)


def test_only_layers_that_recorded_are_taken_in():
    routing = DeferredRouting(3, 4, 2, CPU)
    routing.begin_step(1)
    routing.record(1, torch.tensor([[5, -1]], dtype=torch.int32), None)
    routing.close_step(1, "payload")
    (step,) = routing.finished()
    assert step.payload == "payload" and [(layer, experts.tolist()) for layer, experts in step.events()] == [(1, [5])]
