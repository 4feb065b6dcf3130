"""A pack is whole or not there, whoever is killed, waits or runs out of space."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.store.test_stores import IDENTITY, assert_same, layer, pack, read_all
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file import FileStore, PackInvalid, PackMissing, open_pack
from vllm_adapmoe.store.file_hash import hash_bytes
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout

PACK = """
import sys, torch
from pathlib import Path
from vllm_adapmoe.store.pack_writer import PackWriter
print("ready", flush=True)
sys.stdin.readline()
writer = PackWriter(Path(sys.argv[1]), {"model": "a", "vllm": "1"}, expected_bytes=1)
for layer in range(int(sys.argv[2])):
    writer.put_layer(layer, {"w": torch.full((8, 512, 512), float(layer))})
writer.seal().close()
"""


def start_packing(path: Path, layers: int) -> subprocess.Popen[str]:
    """A process that packs layers of 8 MiB, ready to go: it begins with a line on its input."""
    packer = subprocess.Popen(
        [sys.executable, "-c", PACK, str(path), str(layers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert packer.stdout is not None and packer.stdout.readline() == "ready\n"
    return packer


def go(packer: subprocess.Popen[str]) -> None:
    assert packer.stdin is not None
    packer.stdin.write("\n")
    packer.stdin.flush()


def put_and_seal(path: Path, layers: list[dict[str, torch.Tensor]]) -> FileStore:
    writer = PackWriter(path, IDENTITY, expected_bytes=1)
    for index, tensors in enumerate(layers):
        writer.put_layer(index, tensors)
    return writer.seal()


@pytest.fixture
def waiting(caplog: pytest.LogCaptureFixture):
    """Starts a function in a thread and returns its future once it waits for another writer."""
    with ThreadPoolExecutor(1) as threads:

        def start(*call):
            future = threads.submit(*call)
            deadline = time.monotonic() + 30
            while "waiting for it" not in caplog.text:
                assert not future.done() and time.monotonic() < deadline
                time.sleep(0.005)
            return future

        yield start


def wait_for_bytes(folder: Path, nbytes: int) -> None:
    deadline = time.monotonic() + 60
    while sum(file.stat().st_size for file in folder.glob("*.partial")) < nbytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def full_layers(first: int, end: int) -> dict[int, dict[str, torch.Tensor]]:
    """What `PACK` packs."""
    return {index: {"w": torch.full((8, 512, 512), float(index))} for index in range(first, end)}


def test_a_killed_pack_leaves_nothing_that_looks_whole_and_is_gone_on_with(tmp_path, waiting):
    path, other = tmp_path / "experts.pack", tmp_path / "other" / "experts.pack"
    packer = start_packing(path, 10**6)
    go(packer)
    wait_for_bytes(tmp_path, 20 << 20)
    partial = tmp_path / "experts.pack.partial"
    with pytest.raises(PackMissing):
        open_pack(path, IDENTITY)
    with pytest.raises(PackInvalid):
        open_pack(partial, {})
    next_writer = waiting(PackWriter, path, IDENTITY, 1 << 30)
    packer.send_signal(signal.SIGKILL)
    packer.wait()
    writer = next_writer.result(timeout=60)
    whole = len(writer.packed)
    assert list(writer.packed) == list(range(whole)) and whole >= 2
    assert writer.layout(1) == RecordLayout.of(full_layers(1, 2)[1])
    assert writer.measure_rate() > 0
    for index, tensors in full_layers(whole, whole + 2).items():
        writer.put_layer(index, tensors)
    store = writer.seal()
    assert_same(read_all(store), list(full_layers(0, whole + 2).values()))
    store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack"]
    put_and_seal(other, list(full_layers(0, whole + 2).values())).close()
    assert path.read_bytes() == other.read_bytes()


def leave_three_layers(path: Path) -> int:
    """What a killed writer of layers 0 to 2 leaves; returns the bytes of a layer."""
    writer = PackWriter(path, IDENTITY, expected_bytes=1)
    for index in range(3):
        writer.put_layer(index, layer(index))
    writer._file.close()
    return (path.with_name("experts.pack.partial").stat().st_size - ALIGNMENT) // 3


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def last_line(journal: Path, change: Callable[[dict], object]) -> None:
    """Changes the journal's last line, and gives it the right checksum."""
    lines = journal.read_bytes().splitlines()
    content = json.loads(lines[-1].partition(b" ")[2])
    change(content)
    text = json.dumps(content).encode()
    journal.write_bytes(b"\n".join([*lines[:-1], hash_bytes(text).encode() + b" " + text]) + b"\n")


LEFT = {
    "as it was": (lambda partial, journal, nbytes: None, 3),
    "torn line": (lambda partial, journal, nbytes: os.truncate(journal, journal.stat().st_size - 9), 2),
    "half a layer more": (lambda partial, journal, nbytes: os.truncate(partial, ALIGNMENT + 3 * nbytes + 4096), 3),
    "last record not on the disk": (lambda partial, journal, nbytes: os.truncate(partial, 3 * nbytes), 2),
    "flipped bit in layer 1": (lambda partial, journal, nbytes: flip(partial, ALIGNMENT + nbytes + 5), 1),
    "flipped bit in the journal": (lambda partial, journal, nbytes: flip(journal, journal.stat().st_size // 2), None),
    "no journal": (lambda partial, journal, nbytes: journal.unlink(), 0),
    "no partial file": (lambda partial, journal, nbytes: partial.unlink(), 0),
    "empty journal": (lambda partial, journal, nbytes: journal.write_bytes(b""), 0),
    "absurd record": (
        lambda partial, journal, nbytes: last_line(
            journal, lambda content: content["layout"][0].update(shape=[1 << 40, 1 << 20])
        ),
        2,
    ),
    "absurd offset": (
        lambda partial, journal, nbytes: last_line(journal, lambda content: content.update(offset=-(1 << 70))),
        2,
    ),
    "another kind of line": (
        lambda partial, journal, nbytes: last_line(journal, lambda content: content.update(digests=7)),
        2,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_a_killed_writer_left_is_checked(case, tmp_path):
    path = tmp_path / "experts.pack"
    nbytes = leave_three_layers(path)
    damage, whole = LEFT[case]
    damage(path.with_name("experts.pack.partial"), path.with_name("experts.pack.partial.journal"), nbytes)
    writer = PackWriter(path, IDENTITY, expected_bytes=1)
    kept = len(writer.packed)
    assert kept < 3 if whole is None else kept == whole
    for index in range(kept, 3):
        writer.put_layer(index, layer(index))
    store = writer.seal()
    assert_same(read_all(store), [layer(index) for index in range(3)])
    store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack"]


def test_what_a_killed_writer_of_another_pack_left_is_written_over(tmp_path):
    path = tmp_path / "experts.pack"
    leave_three_layers(path)
    writer = PackWriter(path, IDENTITY | {"vllm": "2"}, expected_bytes=1)
    assert not writer.packed and writer.bytes_left == 1
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_for_the_rest_keeps_what_is_packed(small_disk):
    path = small_disk / "experts.pack"
    leave_three_layers(path)
    with pytest.raises(StoreError, match="free some space"):
        PackWriter(path, IDENTITY, expected_bytes=1 << 30)
    writer = PackWriter(path, IDENTITY, expected_bytes=1)
    assert len(writer.packed) == 3
    writer.abort()


def test_two_processes_make_one_pack(tmp_path):
    path = tmp_path / "experts.pack"
    packers = [start_packing(path, 6) for _ in range(2)]
    for packer in packers:
        go(packer)
    assert [packer.wait(timeout=120) for packer in packers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack"]
    store = open_pack(path, IDENTITY)
    assert_same(read_all(store), [{"w": torch.full((8, 512, 512), float(index))} for index in range(6)])
    store.close()


def test_who_waited_uses_the_finished_pack(tmp_path, waiting):
    path = tmp_path / "experts.pack"
    first = PackWriter(path, IDENTITY, expected_bytes=1)
    second = waiting(put_and_seal, path, [layer(0)])
    first.put_layer(0, layer(0))
    first.seal().close()
    inode = path.stat().st_ino
    store = second.result(timeout=60)
    assert path.stat().st_ino == inode
    assert [file.name for file in tmp_path.iterdir()] == ["experts.pack"]
    assert_same(read_all(store), [layer(0)])
    store.close()


def test_who_waited_for_another_kernel_format_is_told(tmp_path, waiting):
    path = tmp_path / "experts.pack"
    first = PackWriter(path, IDENTITY, expected_bytes=1)
    second = waiting(put_and_seal, path, [layer(0, odd=True)])
    first.put_layer(0, layer(0))
    first.seal().close()
    with pytest.raises(StoreError, match="another kernel format"):
        second.result(timeout=60)


def test_who_waited_for_nothing_packs(tmp_path, waiting):
    path = tmp_path / "experts.pack"
    first = PackWriter(path, IDENTITY, expected_bytes=1)
    second = waiting(put_and_seal, path, [layer(0)])
    first.put_layer(0, layer(1))
    first.abort()
    first.abort()
    store = second.result(timeout=60)
    assert_same(read_all(store), [layer(0)])
    store.close()


def test_aborting_a_sealed_pack_leaves_the_next_writer_alone(tmp_path):
    path = tmp_path / "experts.pack"
    first = PackWriter(path, IDENTITY, expected_bytes=1)
    first.put_layer(0, layer(0))
    first.seal().close()
    second = PackWriter(path, IDENTITY, expected_bytes=1)
    first.abort()
    second.put_layer(0, layer(1))
    store = second.seal()
    assert_same(read_all(store), [layer(1)])
    store.close()


def test_a_forgotten_writer_holds_nobody_up(tmp_path):
    PackWriter(tmp_path / "experts.pack", IDENTITY, expected_bytes=1).put_layer(0, layer(0))
    pack(tmp_path / "experts.pack", [layer(0)]).close()


def test_too_little_space_is_said_before_packing(tmp_path):
    with pytest.raises(StoreError, match=f"experts.pack needs {1 << 60} bytes, [0-9]+ are free; free some space"):
        PackWriter(tmp_path / "experts.pack", IDENTITY, expected_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"root may not mount here: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_fills_up_is_named_and_left_clean(small_disk):
    path = small_disk / "experts.pack"
    free = shutil.disk_usage(small_disk).free
    writer = PackWriter(path, IDENTITY, expected_bytes=3 << 20)
    writer.put_layer(0, layer(0, experts=16))
    with pytest.raises(StoreError, match=f"{path} .*No space left.* [0-9]+ of {3 << 20} bytes are written") as error:
        writer.put_layer(1, layer(1, experts=512))
    assert "\n" not in str(error.value)
    assert list(small_disk.iterdir()) == []
    assert shutil.disk_usage(small_disk).free == free


def test_the_space_of_a_killed_pack_counts_as_free(small_disk):
    path = small_disk / "experts.pack"
    path.with_name("experts.pack.partial").write_bytes(bytes(3 << 20))
    PackWriter(path, IDENTITY, expected_bytes=2 << 20).abort()


def test_a_file_size_limit_is_an_error_like_any_other(tmp_path):
    limit = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))\n"
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    packer = subprocess.run(
        [sys.executable, "-c", limit + PACK, str(tmp_path / "experts.pack"), "8"],
        capture_output=True, text=True, input="\n",
    )  # fmt: skip
    assert "StoreError" in packer.stderr and "cannot be written (File too large)" in packer.stderr
    assert list(tmp_path.iterdir()) == []


STREAM = """
import ctypes, mmap, os, sys, torch
from pathlib import Path
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.file import open_pack
from vllm_adapmoe.store.record import aligned_empty

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def cached(path):
    "Bytes of a file in the page cache."
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    with path.open("rb") as file:
        place = (mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
        address = libc.mmap(None, ctypes.c_size_t(size), *place)
    resident = (ctypes.c_ubyte * (size // 4096))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident) == 0
    return sum(page & 1 for page in resident) * 4096

path = Path(sys.argv[1])
writer = PackWriter(path, {}, expected_bytes=1)
tensors = {"w": torch.ones(8, 512, 512)}
writer.put_layer(0, tensors)
before, peak = anonymous(), 0
for layer in range(1, 12):
    writer.put_layer(layer, tensors)
    peak = max(peak, anonymous())
store = writer.seal()
into = [aligned_empty(512 * 512 * 4)]
for layer in range(12):
    for expert in range(8):
        store.read((layer, expert), into)
print(peak - before, anonymous() - before, cached(path) if store._direct else 0)
path.read_bytes()
print(cached(path), path.stat().st_size)
"""


def test_packing_and_reading_stream(tmp_path):
    """Neither grows with the pack: not the memory of the process, and not the page cache."""
    run = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "experts.pack")], capture_output=True, text=True, check=True
    )
    packing, reading, cached, cached_by_plain_read, size = map(int, run.stdout.split())
    assert cached_by_plain_read == size > 96 << 20
    assert packing < 4 << 20
    assert reading < 8 << 20
    assert cached < 1 << 20
