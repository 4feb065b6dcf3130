"""The host tier: it keeps what is fetched most, never what is in use, and reading through it is reading the file."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.test_stores import assert_same, layer, pack, read_all
from vllm_adapmoe.cache.tiered_store import TieredStore
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.record import aligned_empty, as_bytes

CPU = torch.device("cpu")
EXPERTS = 8


def fetch(tier: HostTier, expert: int) -> bool:
    """Fetches an expert as a store does; returns whether its record was in the tier."""
    key = 0, expert
    if tier.hold(key) is not None:
        tier.release(key)
        return True
    cell = tier.admit(key)
    if cell is not None:
        tier.commit(key, cell)
    return False


def test_what_is_fetched_more_often_replaces_what_is_fetched_less():
    tier = HostTier(2, 1, EXPERTS)
    assert [fetch(tier, expert) for expert in (0, 0, 1, 1, 2)] == [False, True, False, True, False]
    assert fetch(tier, 0) and fetch(tier, 1), "one fetch of another evicts neither"
    assert not fetch(tier, 2) and not fetch(tier, 2) and not fetch(tier, 2)
    assert fetch(tier, 2), "its fourth fetch has taken it in"
    assert sum(fetch(tier, expert) for expert in (0, 1)) <= 1


def test_a_sweep_of_all_experts_leaves_a_part_that_the_next_sweep_hits():
    """An LRU tier would hold none of those that the next sweep asks for first, and so none at all."""
    tier = HostTier(4, 1, EXPERTS)
    sweeps = [[fetch(tier, expert) for expert in range(EXPERTS)] for _ in range(5)]
    assert sweeps == [[False] * EXPERTS] + [[True] * 4 + [False] * 4] * 4


def test_it_follows_its_traffic():
    tier = HostTier(2, 1, EXPERTS)
    for _ in range(500):
        fetch(tier, 0), fetch(tier, 1)
    for _ in range(200):
        hits = [fetch(tier, expert) for expert in (6, 7)]
    assert hits == [True, True], "though each was fetched less often than the others ever were"


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from(["fetch", "hold", "release", "begin", "end", "fail"]),
                                             st.integers(0, EXPERTS - 1)), max_size=80))  # fmt: skip
def test_no_cell_in_use_is_given_away(num_cells, calls):
    tier = HostTier(num_cells, 1, EXPERTS)
    held: dict[int, list[int]] = {expert: [] for expert in range(EXPERTS)}
    written: dict[int, int] = {}
    for call, expert in calls:
        key = 0, expert
        if call == "hold" and (cell := tier.hold(key)) is not None:
            held[expert].append(cell)
        elif call == "release" and held[expert]:
            held[expert].pop()
            tier.release(key)
        elif call == "fetch" and expert not in written:
            fetch(tier, expert)
        elif call == "begin" and expert not in written and (cell := tier.admit(key)) is not None:
            written[expert] = cell
        elif call in ("end", "fail") and expert in written:
            cell = written.pop(expert)
            tier.commit(key, cell) if call == "end" else tier.discard(cell)
        in_use = [cells[0] for cells in held.values() if cells] + list(written.values())
        assert len(set(in_use)) == len(in_use) <= num_cells and len(tier) <= num_cells
        for other, cells in held.items():
            assert all(tier._cell_of[0, other] == cell for cell in cells)
        for other, cell in tier._cell_of.items():
            assert tier._values[cell] == tier.counts[other] and tier._key_of[cell] == other


@pytest.fixture
def file(tmp_path):
    return pack(tmp_path / "experts.pack", [layer(number, EXPERTS, odd=number == 1) for number in range(3)])


LAYERS = [layer(number, EXPERTS, odd=number == 1) for number in range(3)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("aligned", [True, False])
def test_it_reads_as_the_file_does(file, share, aligned):
    total = sum(layout.nbytes * EXPERTS for layout in file.layouts)
    store = TieredStore(file, int(share * total), CPU)
    assert store.num_cells == pytest.approx(share * 3 * EXPERTS, abs=2)
    for _ in range(3):
        assert_same(read_all(store, aligned), LAYERS)
    hits, misses = store.take_counts()
    assert hits + misses == 9 * EXPERTS and hits == 2 * store.num_cells, "what was taken in first is swept again"
    assert store.take_counts() == (0, 0)


def test_what_cannot_be_verified_or_is_not_read_to_its_end_is_not_kept(file):
    store = TieredStore(file, 1 << 30, CPU)
    layout = store.layouts[0]
    into = [aligned_empty(piece.nbytes) for piece in layout.pieces]
    tiles = store.read_tiles((0, 1), into, 4096)
    next(tiles)
    tiles.close()
    with open(file.path, "r+b") as raw:
        raw.seek(file.record_offset((0, 2)) + 5)
        raw.write(b"damaged")
    with pytest.raises(StoreError, match="expert 2 of MoE layer 0 is damaged"):
        store.read((0, 2), into)
    assert len(store._cells[layout.nbytes].tier) == 0


def test_another_store_takes_the_place_of_all_records(file, tmp_path):
    store = TieredStore(file, 1 << 30, CPU)
    read_all(store)
    others = [layer(number + 10, EXPERTS, odd=number == 1) for number in range(3)]
    store.renew(pack(tmp_path / "others.pack", others))
    assert_same(read_all(store), others)


def test_threads_read_the_right_records(file):
    """Each thread fetches experts of its own, as a cache has one load of an expert at a time."""
    store = TieredStore(file, 12 * file.layouts[0].nbytes, CPU)
    wrong: list[tuple[int, int]] = []

    def read(thread: int) -> None:
        random = np.random.default_rng(thread)
        for _ in range(150):
            index, expert = int(random.integers(3)), 2 * int(random.integers(EXPERTS // 2)) + thread
            into = [aligned_empty(piece.nbytes) for piece in store.layouts[index].pieces]
            store.read((index, expert), into)
            for piece, data in zip(store.layouts[index].pieces, into, strict=True):
                if data.numpy().tobytes() != as_bytes(LAYERS[index][piece.name][expert]).numpy().tobytes():
                    wrong.append((index, expert))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and min(store.take_counts()) > 20
