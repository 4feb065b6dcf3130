"""A cache that gives slots back between two steps."""

import gc
import weakref

import torch

from tests.cache.test_manager import LAYERS, assert_served, host_store, manager
from vllm_adapmoe.planning.slot_budget import ExpertShape, slots_without
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import as_bytes


def test_fewer_slots_serve_and_the_old_memory_is_let_go():
    cache = manager(host_store(), [8, 3])
    try:
        assert_served(cache, 0, [0, 1, 2, 3])
        old = [weakref.ref(tensor) for pool in cache.pools for tensor in pool.tensors.values()]
        pools = cache.pools
        cache.resize(CacheController(cache.controller.shape, CacheSetup([3, 3])), None)
        gc.collect()
        assert all(one() is None for one in old), "somebody holds on to the slots that were given back"
        assert cache.pools is pools and cache.num_slots == 6 and cache.num_resident == 0
        assert all((slot_map == -1).all() for slot_map in cache.slot_maps)
        for experts in ([0, 1, 2], [3, 1], [2, 0]):
            assert_served(cache, 0, experts)
        assert cache.stats.misses > 0 and cache.num_resident <= 6
    finally:
        cache.close()


def test_slots_are_given_back_in_proportion_and_never_too_few():
    shapes = [ExpertShape(256, 1000, 2), ExpertShape(64, 3000, 4)]
    assert slots_without(shapes, [100, 20], 0) == [100, 20]
    assert slots_without(shapes, [100, 20], 16_000) == [90, 18]
    assert slots_without(shapes, [100, 20], 1) == [99, 19]
    assert slots_without(shapes, [100, 20], 130_000) is None
    assert slots_without(shapes, [100, 20], 10**9) is None


def test_other_records_from_another_store_and_from_the_same_one():
    first, other = host_store(), HostStore(torch.device("cpu"))
    cache = manager(first, [8, 3], lookahead=2, max_experts=1)
    inverted = [
        {name: (as_bytes(tensor) ^ 255).view(tensor.dtype).view(tensor.shape) for name, tensor in tensors.items()}
        for tensors in LAYERS
    ]
    try:
        assert_served(cache, 0, [0, 1, 2, 3])
        for number, layers in enumerate((inverted, LAYERS)):  # in a store of its own, and then over the records there
            for index, tensors in enumerate(layers):
                other.put_layer(index, tensors)
            if number == 0:
                other.seal()
            cache.replace_store(other)
            assert cache.num_resident == 0 and all((slot_map == -1).all() for slot_map in cache.slot_maps)
            slots = cache.acquire(0, [1, 3])[[1, 3]].tolist()
            for name, tensor in cache.pool(0).tensors.items():
                assert torch.equal(as_bytes(tensor[slots]), as_bytes(layers[0][name][[1, 3]]))
            cache.release(0, [1, 3])
            assert cache.stats.misses == 4 + 2 * (number + 1), "counters go on"
        assert not first._layers, "the one before is closed"
    finally:
        cache.close()
