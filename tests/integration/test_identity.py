"""A pack serves the bytes it was made from, and no others; and it is only read."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_MIXTRAL
from vllm import envs

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.store.folder import packs_root

pytestmark = pytest.mark.engine

ADAPMOE = str(Path(sys.executable).parent / "adapmoe")
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
    profiled = config | {"profile": str(ROOT / "configs" / "tiny_mixtral.json"), "eviction": "next_token"}
    before = tokens(model, profiled)
    first = pack.stat().st_ino
    zero_experts(weights, 60)
    with pytest.raises(AdapMoEError, match=r"profile=.* is for another model .*: hash is "):
        tokens(model, profiled)
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


def test_a_killed_pack_is_gone_on_with(tmp_path):
    """From the real engine, killed when 7 of 12 layers are packed: the pack is the one that is made in one go."""
    run = [sys.executable, str(Path(__file__).with_name("run_pack.py")), str(TINY_MIXTRAL)]
    killed = subprocess.run([*run, "7", str(tmp_path / "store")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert left == ["experts-0-of-1.pack.partial", "experts-0-of-1.pack.partial.journal"]
    stores = [str(tmp_path / name) for name in ("store", "one-go")]
    (tmp_path / "one-go").mkdir()
    (tmp_path / "one-go").chmod(0o777)
    both = subprocess.run([*run, "0", *stores], capture_output=True, text=True)
    assert both.returncode == 0, both.stderr[-2000:]
    assert both.stdout.splitlines()[-1] == f"packed 12 layers into {stores[1]}"
    assert f"packed 5 layers into {stores[0]}" in both.stdout
    text = both.stdout + both.stderr
    assert "7 layers (0.01 GiB) were packed by an interrupted start" in text
    assert re.search(
        r"0\.01 GiB to pack at [0-9.]+ GB/s of disk writes: at least 0 s, .*VLLM_ENGINE_READY_TIMEOUT_S", text
    )
    assert f"can be replaced by all users (mode 777 of '{stores[1]}')" in text
    packs = [Path(store) / "experts-0-of-1.pack" for store in stores]
    assert packs[0].read_bytes() == packs[1].read_bytes()
    assert [path.name for path in packs[0].parent.iterdir()] == [packs[0].name]


def test_a_folder_that_packs_cannot_be_made_in_is_said_before_any_weight_is_read(tmp_path):
    """Without the right to write everywhere that root has, and with HOME=/."""
    (tmp_path / "closed").mkdir(mode=0o555)
    command = [ADAPMOE, "pack", str(TINY_MIXTRAL)]
    if os.geteuid() == 0:
        lost = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", lost, "--inh-caps", lost, *command]
    env = os.environ | {"HOME": "/", "VLLM_CACHE_ROOT": str(tmp_path / "closed" / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 1
    line = run.stderr.splitlines()[-1]
    assert line.startswith("adapmoe: error: the folder of packed experts, ")
    assert f"'{tmp_path}/closed/cache/adapmoe' (VLLM_CACHE_ROOT), cannot be written (Permission denied)" in line
    assert "set store_dir to a writable folder" in line
    assert "Loading safetensors" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    "settings",
    [{}, {"XDG_CACHE_HOME": "/x"}, {"VLLM_CACHE_ROOT": "/v"}, {"VLLM_CACHE_ROOT": "~/v", "XDG_CACHE_HOME": "/x"}],
)
def test_packs_are_in_the_cache_of_vllm(monkeypatch, settings):
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert packs_root(None) == Path(envs.environment_variables["VLLM_CACHE_ROOT"]()) / "adapmoe"
