"""Steps that wait for nothing: real slots, real host memory, the kernel in Triton's interpreter."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.test_experts_by_address import reference
from vllm_adapmoe.device.addresses import AddressTable
from vllm_adapmoe.device.decode_timing import DecodeTimes, time_decode
from vllm_adapmoe.device.in_place import DOWN, GATE_UP, InPlaceDecode

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import State
from vllm_adapmoe.store.host import HostStore

LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 6, 32, 16, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            GATE_UP: (torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5).half(),
            DOWN: (torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5).half(),
        }
        for _ in range(LAYERS)
    ]


@pytest.fixture
def cache(weights):
    store = HostStore(CPU)
    for index, tensors in enumerate(weights):
        store.put_layer(index, tensors)
    store.seal()
    shape = CacheShape([EXPERTS] * LAYERS, TOP_K, [0] * LAYERS, [layout.nbytes for layout in store.layouts])
    cache = ExpertCacheManager(store, CacheController(shape, CacheSetup([8], "next_use")), CPU)
    yield cache
    cache.close()


def settle(cache: ExpertCacheManager) -> None:
    """Until the readers have nothing left to do."""
    while True:
        with cache.transfers.lock:
            if not (cache.transfers.speculative or cache.transfers.jobs):
                return
        time.sleep(0.001)


def run_step(in_place: InPlaceDecode, weights, ids: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    with in_place.step(len(x), "about"):
        chances = torch.full(ids.shape[1:], 0.5)
        return [in_place.experts(layer, x, chances, ids[layer], None) for layer in range(LAYERS)]


def test_outputs_hits_and_catching_up(cache, weights):
    in_place = InPlaceDecode(cache, TOP_K, CPU)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, HIDDEN, generator=generator).half()
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    hits = misses = 0
    for _ in range(12):
        favourites = torch.tensor([[0, 1], [0, 2], [1, 2]]) if torch.rand((), generator=generator) < 0.8 else None
        chosen = favourites if favourites is not None else torch.tensor([[3, 4], [5, -1], [3, 5]])
        ids = torch.stack([chosen, (chosen + 1).where(chosen >= 0, -1) % EXPERTS]).int()
        ids[1][chosen < 0] = -1
        outputs = run_step(in_place, weights, ids, x)
        for layer, output in enumerate(outputs):
            expected = reference(x, torch.full((3, TOP_K), 0.5), ids[layer], *weights[layer].values())
            assert (output.double() - expected).abs().max() <= 2**-9
        key = tuple(ids.view(-1).tolist())
        for first, output in zip(seen.setdefault(key, outputs), outputs, strict=True):
            assert torch.equal(first, output), "where experts were has changed an output"
        (step,) = in_place.routing.finished()
        assert step.payload == "about" and step.ids.tolist() == ids.tolist()
        events = list(step.events())
        assert [experts for _, experts, _ in events] == [sorted({*one.view(-1).tolist()} - {-1}) for one in ids]
        hits += sum(len(there) for _, _, there in events)
        misses += sum(len(experts) - len(there) for _, experts, there in events)
        cache.record_in_place(events)
        settle(cache)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.in_place) == (hits, misses, misses) and stats.demand_loads == 0
    assert 0 < stats.caught_up <= misses and hits > misses, "what is used again and again was loaded"
    assert stats.stall_seconds == 0
    for layer, tensors in enumerate(weights):  # and a step that fetches goes on from there
        experts = [0, 1, 2, 5]
        slots = cache.acquire(layer, experts)[experts].long()
        assert torch.equal(cache.pool(layer).tensors[DOWN][slots], tensors[DOWN][experts])
        cache.release(layer, experts)


def test_nobody_leaves_while_a_step_is_launched(cache):
    for expert in range(4):
        for layer in range(LAYERS):
            cache.acquire(layer, [expert])
            cache.release(layer, [expert])
    assert cache.num_resident == 8
    with cache.frozen() as slots:
        before = slots.copy()
        for _ in range(50):
            cache.record_in_place([(0, [4], set()), (1, [5], set())])  # wanted more than anyone who is there
        time.sleep(0.02)
        resident = np.where(cache.resident(), before, -1)
        assert np.array_equal(resident, before) and cache.stats.caught_up == 0
    settle(cache)
    assert cache.stats.caught_up == 2
    assert cache.controller.pools[0].state((0, 4)) is State.RESIDENT and int(cache.slot_maps[0][4]) >= 0


def test_table_follows_slots(cache):
    table = AddressTable(cache.store, cache.pools, cache.pool_of_layer, (GATE_UP, DOWN), CPU)
    homes = table.table.clone()
    slots = np.full((LAYERS, EXPERTS), -1, dtype=np.int32)
    slots[1, 3] = 5
    table.publish(slots)
    moved = table.table != homes
    assert moved[:, 1, 3].all() and moved.sum() == 2
    assert table.table[1, 1, 3] == cache.pools[0].tensors[DOWN][5].data_ptr()
    table.publish(np.full_like(slots, -1))
    assert torch.equal(table.table, homes)


def test_a_table_that_could_not_be_copied_is_copied_the_next_time(cache, monkeypatch):
    table = AddressTable(cache.store, cache.pools, cache.pool_of_layer, (GATE_UP, DOWN), CPU)
    slots = np.full((LAYERS, EXPERTS), -1, dtype=np.int32)
    slots[1, 3] = 5

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            table.publish(slots)
    table.publish(slots)
    assert table.table[1, 1, 3] == cache.pools[0].tensors[DOWN][5].data_ptr()


def test_a_layer_is_frozen_only_as_a_whole(cache):
    def is_whole() -> bool:
        with cache.whole_layer(0) as whole:
            assert bool(cache.transfers.frozen) == whole
            return whole

    assert not is_whole()
    cache.acquire(0, list(range(EXPERTS)))
    assert not is_whole(), "in use"
    cache.release(0, list(range(EXPERTS)))
    with cache.whole_layer(0) as whole:
        assert whole and cache.transfers.frozen
        cache.record_in_place([(1, [0, 1, 2], set())] * 3)
        time.sleep(0.02)
        assert cache.resident()[0].all() and cache.stats.caught_up == 0
    settle(cache)
    assert cache.stats.caught_up > 0


def test_an_error_in_a_whole_layer_does_not_leave_it_frozen(cache):
    cache.acquire(0, list(range(EXPERTS)))
    cache.release(0, list(range(EXPERTS)))
    with pytest.raises(ValueError, match="of the kernel"), cache.whole_layer(0):
        raise ValueError("of the kernel")
    cache.record_in_place([(1, [0, 1, 2], set())] * 3)
    settle(cache)
    assert cache.stats.caught_up > 0


def test_a_layer_that_is_not_whole_leaves_a_frozen_step_frozen(cache):
    with cache.frozen():
        with cache.whole_layer(0) as whole:
            assert not whole
        assert cache.transfers.frozen
    assert not cache.transfers.frozen


def test_only_layers_that_recorded_are_taken_in():
    routing = DeferredRouting(3, 4, 2, CPU)
    routing.close_step(2, np.zeros((3, EXPERTS), dtype=np.int32), None)
    assert list(routing.finished()) == []
    routing.record(1, torch.tensor([[4, 2], [-1, 4]]), torch.tensor([0.25, 0.5]))
    routing.close_step(2, np.zeros((3, EXPERTS), dtype=np.int32), None)
    routing.record(1, torch.tensor([[0, 0], [0, 0]]), None)  # of the next step, which changes nothing any more
    (step,) = routing.finished()
    assert list(step.events()) == [(1, [2, 4], {2, 4})] and step.costs[1].tolist() == [0.25, 0.5]


def test_both_ways_are_timed(cache):
    in_place = InPlaceDecode(cache, TOP_K, CPU)
    times = time_decode(cache, in_place, TOP_K, torch.float16)
    assert times.misses == [0, 1, 2] and min(times.fetch + times.in_place) > 0
    assert DecodeTimes([0, 2], [1.0, 3.0], [2.0, 2.0]).at(0.5) == (1.5, 2.0)


def test_experts_that_do_not_begin_at_16_bytes():
    """The kernel's loads would be misaligned: there is no table of such addresses."""
    store = HostStore(CPU)
    store.put_layer(0, {GATE_UP: torch.zeros(2, 4, 6).half(), DOWN: torch.zeros(2, 6, 2).half()})
    store.seal()
    shape = CacheShape([2], 1, [0], [store.layouts[0].nbytes])
    cache = ExpertCacheManager(store, CacheController(shape, CacheSetup([2], "lru")), CPU)
    with pytest.raises(ValueError, match="w13_weight or w2_weight does not begin at a multiple of 16 bytes"):
        InPlaceDecode(cache, 1, CPU)
    cache.close()
