"""A pack serves the bytes it was made from, and no others; and it is only read."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_MIXTRAL

from vllm_adapmoe.integration.engine import Engine

pytestmark = pytest.mark.engine

PROMPTS = [[5 + number, 17, 301, 42, 88, 7] * 4 for number in range(3)]
ARGS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 8 << 20,
}


def copy_model(folder: Path) -> Path:
    """The bundled model, in a folder of its own."""
    shutil.copytree(TINY_MIXTRAL, folder, dirs_exist_ok=True)
    return folder


def zero_experts(file: Path, count: int) -> None:
    """Zeroes expert tensors in place, and sets the time of change back: the file keeps size, inode and `mtime`.

    Those that a hash of 64 samples of 4 KiB would not see.
    """
    before, length = file.stat(), int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    sampled = [max(0, before.st_size - 4096) * sample // 63 for sample in range(64)]
    unseen = []
    for name, about in sorted(header.items()):
        if ".experts." in name:
            start, end = (8 + length + offset for offset in about["data_offsets"])
            if not any(place < end and start < place + 4096 for place in sampled):
                unseen.append((start, end))
    with file.open("r+b") as weights:
        for start, end in unseen[:count]:
            weights.seek(start)
            weights.write(bytes(end - start))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)
    assert len(unseen) >= count


def tokens(model: Path | str, adapmoe: dict[str, Any] | None, **engine_args: Any) -> list[list[int]]:
    with Engine(model, adapmoe, **(ARGS | engine_args)) as engine:
        return engine.generate(PROMPTS, 16).tokens


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Mounts `store` of the test's folder read-only at the path that is given, when asked to."""
    place = tmp_path / "mounted"
    place.mkdir()
    (tmp_path / "store").mkdir()
    mount = ["mount", "--bind", tmp_path / "store", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root, and to be allowed to")
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_pack_serves_what_it_was_made_from_and_is_only_read(tmp_path, read_only):
    model, store = copy_model(tmp_path / "model"), tmp_path / "store"
    weights, pack = model / "model.safetensors", store / "experts-0-of-1.pack"
    config = {"cache_experts": 48, "store": "file", "store_dir": str(store)}
    before = tokens(model, config)
    first = pack.stat().st_ino
    zero_experts(weights, 60)
    stock = tokens(model, None)
    assert stock != before
    assert tokens(model, config) == stock
    second = pack.stat().st_ino
    assert second != first
    # The same bytes in another file, as a download or a copy makes it: read once more, and found to be the same.
    shutil.copy(weights, tmp_path / "copy")
    (tmp_path / "copy").replace(weights)
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "probe").touch()
    assert tokens(model, config | {"store_dir": str(read_only)}) == stock
    assert pack.stat().st_ino == second
    assert [path.name for path in store.iterdir()] == [pack.name]
