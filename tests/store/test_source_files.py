"""A model is known by every byte of its files, and they are read again only if they may have changed."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.store.test_stores import IDENTITY, assert_same, layer, read_all
from vllm_adapmoe.store import file_hash, source_files
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file import PackOfAnother, PackOutdated, open_pack
from vllm_adapmoe.store.file_hash import HashCache
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.source_files import SourceFiles


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are hashed."""
    names: list[str] = []
    original = file_hash.hash_file

    def hash_file(path, count):
        names.append(path.name)
        return original(path, count)

    monkeypatch.setattr(file_hash, "hash_file", hash_file)
    return names


@pytest.fixture
def model(tmp_path) -> Path:
    """A model of two weight files that were written long enough ago."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, size in (("a.safetensors", 9 << 20), ("b.safetensors", 5000), ("config.json", 20)):
        (folder / name).write_bytes(os.urandom(size))
    return folder


@pytest.fixture
def settled(monkeypatch):
    """Files count as written long ago, although they are of this test."""
    monkeypatch.setattr(file_hash, "SETTLED_NS", -(10**12))


def sources(model: Path, cache: Path | None = None) -> SourceFiles:
    paths = {path.name: path for path in sorted(model.iterdir())}
    return SourceFiles(str(model), paths, HashCache(cache or model.parent / "hashes"))


def pack(path: Path, model: Path) -> None:
    writer = PackWriter(path, IDENTITY, 1, sources(model))
    writer.put_layer(0, layer(0))
    writer.seal().close()


def set_back(path: Path, change) -> None:
    """Changes a file and sets its time of change back, as `cp -p` and rsync do."""
    before = path.stat()
    time.sleep(0.05)  # longer than a tick of the file system's clock
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def replace_by_copy(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def open_same(path: Path, model: Path) -> None:
    store = open_pack(path, IDENTITY)
    store.check_sources(sources(model))
    assert_same(read_all(store), [layer(0)])
    store.close()


def test_an_unchanged_model_is_not_read_again(tmp_path, model, settled, reads):
    pack(tmp_path / "p.pack", model)
    assert sorted(reads) == ["a.safetensors", "b.safetensors", "config.json"]
    shutil.rmtree(tmp_path / "hashes")  # the pack's own record is enough
    open_same(tmp_path / "p.pack", model)
    assert len(reads) == 3


@pytest.mark.parametrize("name", ["a.safetensors", "config.json"])
def test_one_byte_changed_in_place_is_noticed_although_size_inode_and_mtime_stay(tmp_path, model, settled, name):
    pack(tmp_path / "p.pack", model)
    value = sources(model).model_hash()
    set_back(model / name, one_byte)
    with pytest.raises(PackOutdated, match=f"'{name}' has other bytes") as error:
        open_same(tmp_path / "p.pack", model)
    assert "\n" not in str(error.value)
    assert sources(model).model_hash() != value


def test_the_same_bytes_in_other_files_are_read_once(tmp_path, model, settled, reads):
    pack(tmp_path / "p.pack", model)
    set_back(model / "a.safetensors", replace_by_copy)
    (model / "b.safetensors").touch()
    del reads[:]
    for _ in range(2):
        open_same(tmp_path / "p.pack", model)
    assert sorted(reads) == ["a.safetensors", "b.safetensors"]
    shutil.copytree(model, tmp_path / "elsewhere")
    open_same(tmp_path / "p.pack", tmp_path / "elsewhere")
    assert sources(tmp_path / "elsewhere").model_hash() == sources(model).model_hash()


def test_files_more_or_less_are_noticed(tmp_path, model, settled):
    pack(tmp_path / "p.pack", model)
    (model / "c.safetensors").write_bytes(b"c")
    with pytest.raises(PackOutdated, match=r"'c.safetensors' is new"):
        open_same(tmp_path / "p.pack", model)
    (model / "c.safetensors").unlink()
    (model / "b.safetensors").unlink()
    with pytest.raises(PackOutdated, match=r"'b.safetensors' is missing"):
        open_same(tmp_path / "p.pack", model)


def test_another_model_is_told_from_a_changed_one(tmp_path, model, settled):
    pack(tmp_path / "p.pack", model)
    shutil.copytree(model, tmp_path / "other\nmodel")
    one_byte(tmp_path / "other\nmodel" / "b.safetensors")
    with pytest.raises(PackOfAnother, match=r"another model \('.*/model': 'b.safetensors' has other bytes\)") as error:
        open_same(tmp_path / "p.pack", tmp_path / "other\nmodel")
    assert "\n" not in str(error.value)


def test_the_stamp_of_a_new_file_proves_nothing(tmp_path, model, reads):
    """It may be written again within the same tick of the clock."""
    pack(tmp_path / "p.pack", model)
    assert len(reads) == 3
    for count in (6, 9):
        open_same(tmp_path / "p.pack", model)
        assert len(reads) == count


@pytest.mark.parametrize("change", [one_byte, replace_by_copy, Path.unlink], ids=lambda change: change.__name__)
def test_a_file_that_changes_while_it_is_packed_ends_the_pack(tmp_path, model, settled, change):
    writer = PackWriter(tmp_path / "packs" / "p.pack", IDENTITY, 1, found := sources(model))
    found.start_hashing(os.sched_getaffinity(0))
    writer.put_layer(0, layer(0))
    time.sleep(0.05)
    change(model / "a.safetensors")
    with pytest.raises(StoreError, match=r"'.*/a.safetensors' (has changed while|cannot be read)") as error:
        writer.seal()
    assert "\n" not in str(error.value)
    assert list((tmp_path / "packs").iterdir()) == []


def test_what_a_killed_writer_left_of_another_model_is_not_gone_on_with(tmp_path, model, settled):
    path = tmp_path / "p.pack"
    for change, whole in ((lambda: None, 1), (lambda: set_back(model / "a.safetensors", one_byte), 0)):
        writer = PackWriter(path, IDENTITY, 1, sources(model))
        writer.put_layer(0, layer(0))
        writer._file.close()
        change()
        writer = PackWriter(path, IDENTITY, 1, sources(model))
        assert len(writer.packed) == whole
        writer.abort()


def test_processes_read_a_file_once_between_them(tmp_path, model, settled, reads):
    with ThreadPoolExecutor(4) as threads:
        hashes = set(threads.map(lambda _: sources(model).model_hash(), range(4)))
    assert len(hashes) == 1
    assert sorted(reads) == ["a.safetensors", "b.safetensors", "config.json"]


def damage_entries(folder: Path, change) -> None:
    for entry in folder.iterdir():
        change(entry)


def forge(entry: Path) -> None:
    content = json.loads(entry.read_text())
    entry.write_text(json.dumps(content | {"hash": "0" * 32}))
    entry.chmod(0o666)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: os.truncate(entry, entry.stat().st_size // 2),
        lambda entry: entry.write_bytes(b"[" * 5000),
        lambda entry: entry.write_bytes(b'{"hash": 1}'),
        forge,
    ],
    ids=["torn", "nested", "of another kind", "others may write"],
)
def test_entries_that_cannot_be_believed_are_not(tmp_path, model, settled, reads, change):
    value = sources(model).model_hash()
    damage_entries(tmp_path / "hashes", change)
    assert sources(model).model_hash() == value
    assert len(reads) == 6


def test_without_a_folder_for_hashes_files_are_read_each_time(tmp_path, model, settled, reads, caplog):
    (tmp_path / "file").touch()
    values = {sources(model, tmp_path / "file" / "hashes").model_hash() for _ in range(2)}
    assert len(values) == 1 and len(reads) == 6
    assert sum("set VLLM_CACHE_ROOT" in record.getMessage() for record in caplog.records) == 1


def test_a_missing_file_is_named(model):
    (model / "b.safetensors").unlink()
    (model / "b.safetensors").symlink_to("/no/such/blob")
    with pytest.raises(StoreError, match=r"b.safetensors' cannot be read \(No such file or directory\)"):
        sources(model)


def test_hashing_that_is_not_wanted_any_more_ends(tmp_path, model, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(path, count):
        begun.set()
        while True:
            go_on.wait(0.01)
            count(1)

    monkeypatch.setattr(file_hash, "hash_file", slow)
    found = sources(model)
    found.start_hashing(os.sched_getaffinity(0))
    assert begun.wait(10)
    found.stop_hashing()  # returns
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash")]


def test_long_hashing_is_said(tmp_path, model, monkeypatch, caplog):
    monkeypatch.setattr(source_files, "BAR_SECONDS", -1)
    with caplog.at_level("INFO"):
        sources(model).model_hash()
    assert "Identified" in caplog.text and "GiB of files" in caplog.text
