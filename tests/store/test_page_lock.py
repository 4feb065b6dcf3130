"""Page-locking as the CUDA runtime answers it: a runtime that refuses cannot be provoked here, so it is played."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.store.test_stores import layer
from vllm_adapmoe.device.decode import record_addresses
from vllm_adapmoe.store import host, page_lock
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import as_bytes

CPU = torch.device("cpu")


class Runtime:
    """Locks buffers, and answers with a CUDA error to some calls.

    `cudaHostRegister` of the CUDA Runtime API, Memory Management: "cudaSuccess, cudaErrorInvalidValue,
    cudaErrorMemoryAllocation, cudaErrorHostMemoryAlreadyRegistered, cudaErrorNotSupported".

    Args:
        errors: of each call, 0: success.
    """

    def __init__(self, errors: list[int]) -> None:
        self.errors = errors
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        error = self.errors.pop(0)
        if not error:
            assert address % 4096 == 0
            self.locked[address] = nbytes
        return error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def store_with(monkeypatch):
    def make(*errors: int, integrated: bool = False) -> tuple[HostStore, Runtime]:
        runtime = Runtime(list(errors))
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
    store, runtime = store_with(0, 0, 0)
    record = store.page_locked((1, 2))
    assert record is not None and len(record) == store.layouts[1].nbytes
    (start,) = (
        address for address in runtime.locked if address <= record.data_ptr() < address + runtime.locked[address]
    )
    assert record.data_ptr() - start == 2 * store.layouts[1].nbytes
    assert sum(runtime.locked.values()) == sum(4 * layout.nbytes for layout in store.layouts), "not a byte more"
    store.close()
    assert runtime.locked == {}


def test_a_layer_that_is_refused_is_copied_through_a_buffer_and_the_others_are_not(store_with, caplog):
    with caplog.at_level(logging.WARNING):
        store, runtime = store_with(0, 2, 0)
    assert [store.page_locked((index, 3)) is not None for index in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="expert 0 of MoE layer 1 is not in page-locked memory"):
        record_addresses(store)
    into = [torch.empty(piece.shape, dtype=piece.dtype) for piece in store.layouts[1].pieces]
    store.read((1, 3), into)
    assert torch.equal(as_bytes(into[0]), as_bytes(layer(1)["w13"][3]))
    store.close()
    assert runtime.locked == {}


def test_a_refusal_is_said_once_with_the_sizes(store_with, caplog, monkeypatch):
    monkeypatch.setattr(host, "GiB", 1 << 16)  # a layer's records
    monkeypatch.setattr(page_lock, "_is_wsl", lambda: False)
    with caplog.at_level(logging.WARNING):
        store_with(2, 0, 2)
    (record,) = caplog.records
    assert record.getMessage() == (
        "1.00 GiB of experts are page-locked; 2.00 GiB are not, and are copied through a buffer, which is slower: the "
        "driver lacks host or GPU memory to lock and map it (CUDA error 2); free some of both, or set store=file"
    )


@pytest.mark.parametrize(
    ("error", "wsl", "said"),
    [
        (1, False, "`dmesg | grep NVRM` may say why"),
        (2, True, "Windows limits what WSL may lock"),
        (712, False, "another library in this process has locked it already"),
        (801, False, "this machine does not support page-locking"),
    ],
)
def test_what_is_said_is_true_of_the_error(store_with, caplog, monkeypatch, error, wsl, said):
    monkeypatch.setattr(page_lock, "_is_wsl", lambda: wsl)
    with caplog.at_level(logging.WARNING):
        store_with(0, error, error)
    assert said in caplog.text and f"(CUDA error {error})" in caplog.text
    assert "ulimit" not in caplog.text, "NVIDIA's driver pins pages itself, and that limit is not asked"


def test_shared_memory_is_not_locked(store_with, caplog):
    with caplog.at_level(logging.WARNING):
        store, runtime = store_with(integrated=True)
    assert runtime.locked == {} and "shares the host's memory" in caplog.text
    assert store.page_locked((0, 0)) is None


def test_without_a_gpu_the_slots_are_in_host_memory_too():
    store = HostStore(torch.device("cpu"))
    store.put_layer(0, layer(0, experts=4))
    assert store.seal().page_locked((0, 1)) is not None
