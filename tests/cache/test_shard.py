"""A rank that holds only some experts whole: asked by the model's numbers, and never fetches another rank's."""

import numpy as np
import pytest
import torch

from tests.cache.entries import entries
from tests.store.test_stores import layer
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import as_bytes
from vllm_adapmoe.store.shard import StoreShard

EXPERTS, SLOTS = 8, 10
LAYERS = [layer(number, EXPERTS) for number in range(3)]
HELD = [[0, 1, 2, 3], [1, 3, 5, 7], [4, 5, 6, 7]]


@pytest.fixture
def cache():
    store = HostStore(torch.device("cpu"))
    for index, held in enumerate(HELD):
        store.put_layer(index, {name: tensor[held].contiguous() for name, tensor in LAYERS[index].items()})
    records = [[held.index(expert) if expert in held else -1 for expert in range(EXPERTS)] for held in HELD]
    shard = StoreShard(store.seal(), records)
    shape = CacheShape([EXPERTS] * 3, 2, [0] * 3, [layout.nbytes for layout in shard.layouts], HELD)
    controller = CacheController(shape, CacheSetup([SLOTS], lookahead=2, max_experts=1))
    # Without readers everything is fetched by who asks: what is wanted is there when the call returns.
    manager = ExpertCacheManager(shard, controller, torch.device("cpu"), readers=0)
    yield manager
    manager.close()


def test_experts_have_the_models_numbers(cache):
    for index, held in enumerate(HELD):
        slots = cache.acquire(index, held)[held].tolist()
        for name, tensor in cache.pool(index).tensors.items():
            assert torch.equal(as_bytes(tensor[slots]), as_bytes(LAYERS[index][name][held]))
        cache.release(index, held)
        (others,) = np.nonzero(~cache.controller.is_local[index])
        assert (cache.slot_maps[index][others] == -1).all()
    with pytest.raises(AssertionError, match="another rank holds expert 0 of layer 1"):
        cache.store.read((1, 0), [])


def test_an_event_without_own_experts(cache):
    assert not list(cache.arrivals(cache.begin(0, [])))
    cache.release(0, [])
    assert cache.stats.hits == cache.stats.misses == 0


def test_what_others_hold_is_not_fetched_ahead(cache):
    residency = cache.controller.pools[0]
    cache.prefetch_first_layers(100, ())  # a prompt that wants all of every layer
    assert entries(residency) and set(entries(residency)) <= {(0, expert) for expert in HELD[0]}
    cache.acquire(0, HELD[0])
    cache.release(0, HELD[0])
    cache.prefetch_first_layers(0, ())
    predicted = PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))
    cache.prefetch(0, (np.array([[0, 1]]), np.ones((1, 2), dtype=bool)), {1: predicted}.get)
    assert (1, 1) in entries(residency) and (1, 0) not in entries(residency)
