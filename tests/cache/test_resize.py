"""A cache that gives slots back between two steps."""

import gc
import weakref

from tests.cache.test_manager import assert_served, host_store, manager
from vllm_adapmoe.cache.budget import ExpertShape, slots_without
from vllm_adapmoe.cache.controller import CacheController, CacheSetup


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
