"""Experts that are replaced again and again: what was put last comes back, and the folder shows none of it."""

import os
from pathlib import Path

import pytest
import torch

from tests.store.test_stores import assert_same, layer, pack, read_all
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.record import RecordLayout
from vllm_adapmoe.store.unnamed_pack import UnnamedPack

FIRST = [layer(1), layer(2, odd=True)]
LAYOUTS = [RecordLayout.of(tensors) for tensors in FIRST]
HUGE = RecordLayout.of({"w": torch.empty(1, 1 << 50, dtype=torch.uint8, device="meta")})


def test_what_was_put_last_comes_back(tmp_path):
    unnamed = UnnamedPack(tmp_path, LAYOUTS, [4, 4])
    for seed in (3, 5):
        layers = [layer(seed), layer(seed + 1, odd=True)]
        for index in (1, 0):
            unnamed.put_layer(index, layers[index])
        store = unnamed.seal()
        assert_same(read_all(store), layers)
        assert_same(read_all(store, aligned=False), layers)
        store.close()
    assert list(tmp_path.iterdir()) == [], "it goes with the process"
    unnamed.abort()


def test_damage_is_noticed(tmp_path):
    unnamed = UnnamedPack(tmp_path, LAYOUTS, [4, 4])
    for index, tensors in enumerate(FIRST):
        unnamed.put_layer(index, tensors)
    store = unnamed.seal()
    os.pwrite(os.open(f"/proc/self/fd/{unnamed._file.fileno()}", os.O_WRONLY), b"x" * 64, store.record_offset((1, 2)))
    with pytest.raises(StoreError, match="expert 2 of MoE layer 1 is damaged"):
        read_all(store)


def test_the_space_is_taken_before_anything_is_written(tmp_path):
    with pytest.raises(StoreError, match=f"cannot take {4096 + 4 * HUGE.nbytes} bytes for replaced experts") as caught:
        UnnamedPack(tmp_path, [HUGE], [4])
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="No such file"):
        UnnamedPack(tmp_path / "nowhere", LAYOUTS, [4, 4])


def test_host_memory_is_written_over(tmp_path):
    store = HostStore(torch.device("cpu"))
    for index, tensors in enumerate(FIRST):
        store.put_layer(index, tensors)
    store.seal()
    record = store.page_locked((1, 3))
    again = [layer(3), layer(4, odd=True)]
    for index, tensors in enumerate(again):
        store.put_layer(index, tensors)
    assert_same(read_all(store), again)
    assert record is not None and store.page_locked((1, 3)).data_ptr() == record.data_ptr(), (
        "a device knows where it is"
    )


def test_the_pack_beside_it_stays(tmp_path):
    path: Path = tmp_path / "experts.pack"
    named = pack(path, FIRST)
    before = path.read_bytes()
    UnnamedPack(tmp_path, named.layouts, [4, 4]).put_layer(0, layer(9))
    assert path.read_bytes() == before
    assert_same(read_all(named), FIRST)
