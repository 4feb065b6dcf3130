"""The kernel that copies records into slots, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.device import fetch
from vllm_adapmoe.device.fetch import Fetch
from vllm_adapmoe.device.residency import Loads
from vllm_adapmoe.store.host import HostStore

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fetch, "PROGRAMS", 3)
    monkeypatch.setattr(fetch, "CHUNK", 256)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.sampled_from([1, 4, 16, 24, 256, 272, 700, 1040]), min_size=1, max_size=3),
    copies=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_bytes_of_any_record(sizes, copies, seed):
    """Whole records in their slots, of pieces of any size, and no other byte."""
    chance = torch.Generator().manual_seed(seed)
    store = HostStore(CPU)
    pieces = {
        f"piece{number}": torch.randint(256, (5, size), generator=chance, dtype=torch.uint8)
        for number, size in enumerate(sizes)
    }
    store.put_layer(0, pieces)
    store.seal()
    pool = SlotPool(store.layouts[0], 6, CPU)
    for tensor in pool.tensors.values():
        tensor.fill_(77)
    experts, slots = (torch.randperm(5, generator=chance)[:copies].tolist() for _ in range(2))
    loads = Loads(5, CPU)
    for kind in range(2):
        loads.entries[kind].fill_(-1)
    for number, (expert, slot) in enumerate(zip(experts, slots, strict=True)):
        record = store.page_locked((0, expert))
        assert record is not None
        loads.entries[1, number] = torch.tensor([record.data_ptr(), slot])
    loads.counts[1] = copies
    copy = Fetch(pool)
    copy(loads, 0)
    for tensor in pool.tensors.values():
        assert (tensor == 77).all(), "nothing to copy"
    copy(loads, 1)
    for name, tensor in pool.tensors.items():
        expected = torch.full_like(tensor, 77)
        expected[slots] = pieces[name][experts]
        assert torch.equal(tensor, expected)
