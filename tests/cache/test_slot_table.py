"""Residency and eviction, against a brute-force model."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.cache.eviction import LRU
from vllm_adapmoe.cache.slot_table import SlotTable, waves

requests = st.lists(
    st.tuples(st.integers(0, 3), st.sets(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=60
)


@given(requests, st.integers(4, 12))
def test_lru_pool_serves_every_request_whole(requests, num_slots):
    table = SlotTable(num_slots, LRU())
    recency: list[tuple[int, int]] = []  # least recent first
    for layer, experts in requests:
        keys = [(layer, expert) for expert in sorted(experts)]
        resident = set(recency)
        loads = table.request(keys)
        assert [load.key for load in loads] == [key for key in keys if key not in resident]
        # What left is what was used longest ago, among those not requested now.
        overflow = len(resident | set(keys)) - num_slots
        expected = [key for key in recency if key not in keys][: max(0, overflow)]
        assert [load.evicted for load in loads if load.evicted is not None] == expected
        touched = [key for key in keys if key in resident] + [load.key for load in loads]
        recency = [key for key in recency if key not in keys and key not in expected] + touched
        # Every resident expert has a slot of its own.
        assert set(table.slot_of) == set(recency)
        assert len(set(table.slot_of.values())) == len(recency) <= num_slots
        assert sorted([*table.slot_of.values(), *table.free]) == list(range(num_slots))


def test_a_failed_load_gives_its_slot_back():
    table = SlotTable(2, LRU())
    (load,) = table.request([(0, 1)])
    table.forget(load.key)
    assert table.slot_of == {} and sorted(table.free) == [0, 1]
    assert [again.key for again in table.request([(0, 1)])] == [(0, 1)]


@given(st.sets(st.integers(0, 200)), st.integers(1, 40))
def test_waves_load_each_expert_once_and_fit_the_slots(experts, num_slots):
    groups = waves(sorted(experts), num_slots)
    assert sorted(expert for group in groups for expert in group) == sorted(experts)
    assert all(0 < len(group) <= num_slots for group in groups)
    assert len(groups) == -(-len(experts) // num_slots)
