"""Experts come back as they were put in, from host memory and from a packed file; damage is always noticed."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adapmoe.store.base import ExpertStore, StoreError
from vllm_adapmoe.store.file import PackInvalid, PackMissing, PackOfAnother, open_pack
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, aligned_empty, as_bytes

IDENTITY = {"model": "a", "vllm": "1"}
DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def layer(seed: int, experts: int = 4, odd: bool = False) -> dict[str, torch.Tensor]:
    """Experts of a layer; `odd` ones have pieces that fill no whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w13": (experts, 96, 33 if odd else 64), "w2": (experts, 32, 64), "scale": (experts,)}
    if not odd:
        del shapes["scale"]
    return {name: random_tensor(shape, torch.bfloat16, generator) for name, shape in shapes.items()}


def pack(path: Path, layers: list[dict[str, torch.Tensor]]) -> ExpertStore:
    writer = PackWriter(path, IDENTITY, expected_bytes=1 << 20)
    for index in reversed(range(len(layers))):
        writer.put_layer(index, layers[index])
    return writer.seal()


def read_all(store: ExpertStore, aligned: bool = True) -> list[dict[str, torch.Tensor]]:
    result = []
    for index in range(store.num_layers):
        layout, experts = store.layouts[index], store.num_experts(index)
        tensors = {piece.name: torch.empty((experts, *piece.shape), dtype=piece.dtype) for piece in layout.pieces}
        for expert in range(experts):
            if aligned:
                into = [aligned_empty(piece.nbytes) for piece in layout.pieces]
            else:
                into = [torch.empty(piece.nbytes + 1, dtype=torch.uint8)[1:] for piece in layout.pieces]
            store.read((index, expert), into)
            for piece, data in zip(layout.pieces, into, strict=True):
                as_bytes(tensors[piece.name][expert]).copy_(data)
        result.append(tensors)
    return result


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            assert torch.equal(as_bytes(mine[name]), as_bytes(other[name])), name


class Contended(list):
    """Of which another thread takes the last entry, just after one has looked."""

    def __bool__(self) -> bool:
        looked = len(self) > 0
        self.clear()
        return looked


def test_the_last_buffer_may_be_taken_by_another_thread(tmp_path):
    store = pack(tmp_path / "experts.pack", [layer(0, odd=True)])
    store._aside = Contended([aligned_empty(store.layouts[0].nbytes)])
    assert_same(read_all(store, aligned=False), [layer(0, odd=True)])


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 40), max_size=3)), min_size=1, max_size=5),
    st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_layouts_are_aligned_and_stores_round_trip(tmp_path_factory, pieces, experts):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"p{number}": random_tensor((experts, *shape), dtype, generator) for number, (dtype, shape) in enumerate(pieces)
    }
    layout = RecordLayout.of(tensors)
    assert RecordLayout.from_json(layout.to_json()) == layout
    assert hash(RecordLayout.from_json(layout.to_json())) == hash(layout)
    assert layout.nbytes % ALIGNMENT == 0
    ends = [0] + [piece.offset + piece.nbytes for piece in layout.pieces]
    for piece, end in zip(layout.pieces, ends, strict=False):
        assert piece.offset % ALIGNMENT == 0 and piece.offset >= end
    host = HostStore(torch.device("cpu"))
    host.put_layer(0, tensors)
    path = tmp_path_factory.mktemp("pack") / "experts.pack"
    for store in (host.seal(), pack(path, [tensors])):
        for aligned in (True, False):
            assert_same(read_all(store, aligned), [tensors])
        store.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_record_is_read_into_tensors_of_its_own_dtypes(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: random_tensor((3, 64, 64), dtype, generator) for name in ("w13", "w2")}
    host = HostStore(torch.device("cpu"))
    host.put_layer(0, tensors)
    for store in (host.seal(), pack(tmp_path / "experts.pack", [tensors])):
        (layout,) = store.layouts
        views = {piece.name: torch.empty(piece.shape, dtype=piece.dtype) for piece in layout.pieces}
        store.read((0, 2), list(views.values()))
        assert_same([views], [{name: tensor[2] for name, tensor in tensors.items()}])
        with pytest.raises(ValueError, match="bytes for pieces of"):
            store.read((0, 2), [aligned_empty(2 * piece.nbytes) for piece in layout.pieces])
        with pytest.raises(ValueError, match="not contiguous"):
            store.read((0, 2), [view.t() for view in views.values()])
        store.close()


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """A folder on a file system with direct I/O, and one without."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path(f"/dev/shm/adapmoe-test-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_a_pack_outlives_its_writer(folder):
    layers = [layer(0), layer(1, odd=True), layer(2, experts=7)]
    pack(folder / "experts.pack", layers).close()
    assert [path.name for path in folder.iterdir()] == ["experts.pack"]
    store = open_pack(folder / "experts.pack", IDENTITY)
    assert_same(read_all(store), layers)
    with ThreadPoolExecutor(8) as threads:
        for ours in threads.map(lambda _: read_all(store, aligned=False), range(16)):
            assert_same(ours, layers)
    store.close()


def test_what_a_pack_was_made_from_is_compared(tmp_path):
    path = tmp_path / "experts.pack"
    with pytest.raises(PackMissing):
        open_pack(path, IDENTITY)
    pack(path, [layer(0)]).close()
    with pytest.raises(PackOfAnother, match=r"another vllm \(1, here 2\)"):
        open_pack(path, IDENTITY | {"vllm": "2"})
    with pytest.raises(PackOfAnother, match=r"another dtype \(None, here half\)"):
        open_pack(path, IDENTITY | {"dtype": "half"})


@pytest.mark.parametrize("keep", [0, 1, ALIGNMENT - 1, ALIGNMENT, 0.5, -ALIGNMENT, -1])
def test_a_truncated_pack_is_not_opened(tmp_path, keep):
    path = tmp_path / "experts.pack"
    pack(path, [layer(0), layer(1)]).close()
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(PackInvalid):
        open_pack(path, IDENTITY)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_that_matters_is_noticed(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("pack") / "experts.pack"
    layers = [layer(0, experts=2)]
    pack(path, layers).close()
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        store = open_pack(path, IDENTITY)
    except PackInvalid:
        return
    index = store._index
    end_of_records = index.offsets[0] + 2 * store.layouts[0].nbytes
    if index.offsets[0] <= int(where * len(data)) < end_of_records:
        with pytest.raises(StoreError, match="damaged") as error:
            read_all(store)
        assert "\n" not in str(error.value)
        assert not path.exists() and path.with_name("experts.pack.corrupt").exists()
    else:  # padding of the first or the last block
        assert_same(read_all(store), layers)
    store.close()


def damage(path: Path, offset: int) -> None:
    """Flips a bit in place: the file stays the same file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def read_failure(store: ExpertStore, expert: int) -> str:
    with pytest.raises(StoreError) as error:
        store.read((0, expert), [aligned_empty(piece.nbytes) for piece in store.layouts[0].pieces])
    return str(error.value)


def test_several_readers_meet_the_same_damage(tmp_path):
    path = tmp_path / "experts.pack"
    store = pack(path, [layer(0)])
    damage(path, ALIGNMENT + 10)
    damage(path, ALIGNMENT + store.layouts[0].nbytes + 10)
    with ThreadPoolExecutor(4) as threads:
        failures = list(threads.map(lambda number: read_failure(store, number % 2), range(8)))
    assert sum("was renamed to experts.pack.corrupt" in failure for failure in failures) >= 1
    assert all("is damaged" in failure and "start again" in failure for failure in failures)
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack.corrupt"]
    store.close()


def test_damage_in_a_replaced_pack_leaves_its_successor_alone(tmp_path):
    path = tmp_path / "experts.pack"
    layers = [layer(0)]
    old = pack(path, layers)
    damage(path, ALIGNMENT + 10)
    new = pack(path, layers)
    assert "renamed or replaced" in read_failure(old, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack"]
    assert_same(read_all(new), layers)
    old.close()
    new.close()
    new.close()  # the number of its descriptor may be another file's by now


def test_a_tile_may_go_over_pieces(tmp_path):
    """One read for as much of a record as a tile takes, whatever pieces that is of."""
    store = pack(tmp_path / "experts.pack", [layer(0)])
    layout = store.layouts[0]
    sizes = [piece.nbytes for piece in layout.pieces]
    assert sizes == [3 * ALIGNMENT, ALIGNMENT]
    for tile, expected in ((ALIGNMENT, [1] * 4), (2 * ALIGNMENT, [2, 2]), (3 * ALIGNMENT, [3, 1]), (1 << 20, [4])):
        into = [aligned_empty(size) for size in sizes]
        assert list(store.read_tiles((0, 1), into, tile)) == [count * ALIGNMENT for count in expected]
        for piece, data in zip(layout.pieces, into, strict=True):
            assert torch.equal(data, as_bytes(layer(0)[piece.name][1]))
