"""Page-locking as the CUDA runtime answers it: a runtime that refuses cannot be provoked here, so it is played."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.store.test_stores import layer
from vllm_adapmoe.store import page_lock
from vllm_adapmoe.store.host import HostStore


class Runtime:
    """Locks so many buffers, then answers with CUDA's error 2, out of memory."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.locked: dict[int, int] = {}
        self.refused = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.locked) == self.most:
            self.refused += 1
            return 2
        assert address % 4096 == 0
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def store_with(monkeypatch):
    def make(most: int, integrated: bool = False) -> tuple[HostStore, Runtime]:
        runtime = Runtime(most)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=int(integrated))
        )
        monkeypatch.setattr(page_lock, "_forget_error", lambda: None)
        store = HostStore(torch.device("cuda"))
        for index in range(3):
            store.put_layer(index, layer(index, experts=4))
        return store.seal(), runtime

    return make


def test_records_are_locked_where_they_are(store_with):
    store, runtime = store_with(most=3)
    record = store.page_locked((1, 2))
    assert record is not None and len(record) == store.layouts[1].nbytes
    (start,) = (
        address for address in runtime.locked if address <= record.data_ptr() < address + runtime.locked[address]
    )
    assert record.data_ptr() - start == 2 * store.layouts[1].nbytes
    assert sum(runtime.locked.values()) == sum(4 * layout.nbytes for layout in store.layouts), "not a byte more"
    store.close()
    assert runtime.locked == {}


def test_a_refusal_is_said_once_and_records_are_copied_through_a_buffer(store_with, caplog):
    with caplog.at_level(logging.WARNING):
        store, runtime = store_with(most=1)
    assert runtime.refused == 1 and "cannot be page-locked (CUDA error 2)" in caplog.text and "ulimit -l" in caplog.text
    assert all(store.page_locked((index, 0)) is None for index in range(3))
    store.close()
    assert runtime.locked == {}


def test_shared_memory_is_not_locked(store_with, caplog):
    with caplog.at_level(logging.WARNING):
        store, runtime = store_with(most=3, integrated=True)
    assert runtime.locked == {} and "shares the host's memory" in caplog.text
    assert store.page_locked((0, 0)) is None


def test_without_a_gpu_the_slots_are_in_host_memory_too():
    store = HostStore(torch.device("cpu"))
    store.put_layer(0, layer(0, experts=4))
    assert store.seal().page_locked((0, 1)) is not None
