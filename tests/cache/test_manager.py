"""The manager keeps slots, maps and weights in step, on real stores."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.test_stores import layer, pack
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import as_bytes

LAYERS = [layer(number, experts=6) for number in range(3)] + [layer(9, experts=4, odd=True)]
POOL_OF = [0, 0, 0, 1]


def host_store() -> HostStore:
    store = HostStore()
    for index, tensors in enumerate(LAYERS):
        store.put_layer(index, tensors)
    return store.seal()


def assert_served(cache: ExpertCacheManager, index: int, experts: list[int]) -> None:
    slot_map = cache.acquire(index, experts)
    assert slot_map.dtype == torch.int32
    slots = slot_map[experts].tolist()
    assert len(set(slots)) == len(experts) and min(slots) >= 0
    for name, tensor in cache.pool(index).tensors.items():
        assert tensor.shape == (cache.pool(index).num_slots, *LAYERS[index][name].shape[1:])
        assert torch.equal(as_bytes(tensor[slots]), as_bytes(LAYERS[index][name][experts]))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1, max_size=3)), max_size=40),
    st.sampled_from([[3, 3], [7, 4], [18, 3]]),
)
@settings(max_examples=50, deadline=None)
def test_every_acquired_expert_is_in_its_slot(requests, slots):
    cache = ExpertCacheManager(host_store(), POOL_OF, slots, torch.device("cpu"))
    for index, experts in requests:
        assert_served(cache, index, sorted(experts))
    stats = cache.stats
    assert stats.hits + stats.misses == sum(len(experts) for _, experts in requests)
    assert cache.num_slots == sum(slots) and cache.num_resident <= sum(slots)
    # A slot belongs to one expert, and the maps name exactly what is resident.
    for pool in (0, 1):
        mapped = [slot for index in range(4) if POOL_OF[index] == pool for slot in cache.slot_maps[index].tolist()]
        resident = [slot for slot in mapped if slot >= 0]
        assert len(set(resident)) == len(resident) == len(cache.tables[pool].slot_of)
    cache.close()


def test_a_damaged_record_is_never_served(tmp_path: Path):
    path = tmp_path / "experts.pack"
    store = pack(path, LAYERS)
    offset = store._index.offsets[1] + 2 * store.layouts[1].nbytes + 10  # expert 2 of layer 1
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    cache = ExpertCacheManager(store, POOL_OF, [18, 4], torch.device("cpu"))
    assert_served(cache, 1, [0, 1])
    with pytest.raises(StoreError, match="expert 2 of MoE layer 1 is damaged"):
        cache.acquire(1, [1, 2, 3])
    assert cache.slot_maps[1].tolist()[2] == -1
    assert_served(cache, 1, [1, 3])
    assert_served(cache, 0, [0, 1, 2, 3, 4, 5])
    cache.close()
