"""A model is the weights that vLLM loads, however it gets them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_MIXTRAL

from tests.integration.small_hub import COMMIT, SmallHub

pytestmark = pytest.mark.engine

OLD = "0" * 40
RUN_OFFLINE = Path(__file__).with_name("run_offline.py")
MODELSCOPE = """
from pathlib import Path
def snapshot_download(model_id, cache_dir=None, revision=None, **others):
    return str(Path(__file__).parents[3] / "modelscope" / f"{model_id}-{revision or 'master'}")
"""


def weights(folder: Path, change: bool = False) -> Path:
    """A model in a folder: its configuration, and a file for weights."""
    folder.mkdir(parents=True)
    shutil.copy(TINY_MIXTRAL / "config.json", folder)
    (folder / "model.safetensors").write_bytes(bytes(5000) + (b"other" if change else b"these"))
    return folder


def hub_cache(root: Path, files: Path, commit: str, name: str = "models--org--m", only: str = "*") -> None:
    """What a hub's client makes of a download: blobs, snapshots that link to them, and names of commits."""
    repository = root / name
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files.glob(only):
        blob = repository / "blobs" / f"{commit[:1]}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs" / ("old" if commit == OLD else "main")).write_text(commit)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("models")
    plain, other = weights(root / "plain"), weights(root / "other", change=True)
    links = root / "links"
    links.mkdir()
    for file in plain.iterdir():
        (links / file.name).symlink_to(file)
    hub, downloads, packages = root / "hub", root / "downloads", root / "packages"
    hub_cache(hub, plain, COMMIT)
    hub_cache(hub, other, OLD)
    hub_cache(hub, plain, COMMIT, "models--org--json", only="*.json")
    hub_cache(hub, plain, COMMIT, "models--org--elsewhere", only="*.json")
    hub_cache(downloads, plain, COMMIT, "models--org--elsewhere", only="*.safetensors")
    weights(root / "modelscope" / "org/m-master")
    weights(root / "modelscope" / "org/m-v2", change=True)
    (packages / "modelscope" / "hub").mkdir(parents=True)
    (packages / "modelscope" / "hub" / "snapshot_download.py").write_text(MODELSCOPE)
    unused = weights(root / "unused")
    (unused / "pytorch_model.bin").write_bytes(b"not loaded")
    (unused / "old-0001.safetensors").write_bytes(b"not in the index")
    (unused / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    settings = weights(root / "settings")
    (settings / "hf_quant_config.json").write_text("{}")
    streamed = {"load_format": "runai_streamer"}
    scope = {"VLLM_USE_MODELSCOPE": "1"}
    cases: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("folder", {}, {"model": str(plain), "load": {}}),
        ("other", {}, {"model": str(other), "load": {}}),
        ("links", {}, {"model": str(links), "load": {}}),
        ("hub", {}, {"model": "org/m", "load": {}}),
        ("hub, by commit", {}, {"model": "org/m", "revision": COMMIT, "load": {}}),
        ("hub, old", {}, {"model": "org/m", "revision": "old", "load": {}}),
        ("hub, not to be downloaded", {}, {"model": "org/m", "download": False, "load": {}}),
        ("json only", {}, {"model": "org/json", "load": {}}),
        ("json only, not to be downloaded", {}, {"model": "org/json", "download": False, "load": {}}),
        ("download_dir", {}, {"model": "org/elsewhere", "load": {"download_dir": str(downloads)}}),
        ("without download_dir", {}, {"model": "org/elsewhere", "load": {}}),
        ("nowhere", {}, {"model": "org/nowhere", "download": False, "load": {}}),
        ("modelscope", scope, {"model": "org/m", "load": {}}),
        ("modelscope, v2", scope, {"model": "org/m", "revision": "v2", "load": {}}),
        ("object storage", {}, {"model": str(plain), "model_weights": "s3://b/m", "load": streamed}),
        ("streamer", {}, {"model": str(plain), "load": streamed}),
        ("unused", {}, {"model": str(unused), "load": {}}),
        ("settings", {}, {"model": str(settings), "load": {}}),
        ("dummy", {}, {"model": str(plain), "load": {"load_format": "dummy"}}),
        ("npcache", {}, {"model": str(plain), "load": {"load_format": "npcache"}}),
        ("sharded", {}, {"model": str(plain), "load": {"load_format": "sharded_state"}}),
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_identities.py"), json.dumps(cases)],
        capture_output=True, text=True,
        env=os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub),
            "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        },
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1]) | {"root": {"": str(root)}}


SAME = ("links", "hub", "hub, by commit", "hub, not to be downloaded", "download_dir", "modelscope", "unused")


@pytest.mark.parametrize("case", SAME)
def test_the_same_weights_are_the_same_model(found, case):
    assert found[case].get("hash") == found["folder"]["hash"], found[case]


@pytest.mark.parametrize("case", ["hub, old", "modelscope, v2"])
def test_another_revision_is_another_model(found, case):
    assert found[case].get("hash") == found["other"]["hash"] != found["folder"]["hash"], found[case]


def test_settings_of_a_quantisation_count(found):
    assert found["settings"]["hash"] != found["folder"]["hash"]


def test_random_weights_are_not_those_of_the_files(found):
    assert found["dummy"]["hash"] not in (found["folder"]["hash"], found["other"]["hash"])


REFUSED = {
    "json only": r"model='org/json': vLLM finds no weights of it",
    "json only, not to be downloaded": r"model='org/json': vLLM finds no weights of it",
    "without download_dir": r"model='org/elsewhere': vLLM finds no weights of it",
    "nowhere": r"model='org/nowhere': vLLM finds no weights of it",
    "object storage": r"model='s3://b/m' is in object storage, .*; set store='host'",
    "streamer": r"vLLM finds no weights of it \(.*runai",
    "npcache": r"load_format='npcache'.* set load_format='auto'",
    "sharded": r"load_format='sharded_state'.* set load_format='auto'",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_identified_is_refused_by_name(found, case):
    assert "refused" in found[case], found[case]
    with pytest.raises(ValueError, match=REFUSED[case]):
        raise ValueError(found[case]["refused"])
    assert "\n" not in found[case]["refused"]


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    """A hub that serves the bundled model as `org/m`."""
    hub = SmallHub(TINY_MIXTRAL)
    yield hub
    hub.close()


def test_a_model_by_its_name_is_the_one_in_the_folder(tmp_path, hub):
    """A cache holds nothing but its configuration so far: a profile is held to weights that are yet to be downloaded.

    They go into a `download_dir`, and the pack that is made of them serves the same model from a folder.
    """
    hub_cache(tmp_path / "hub", TINY_MIXTRAL, COMMIT, only="*.json")
    config = {
        "cache_experts": 48, "store": "file", "store_dir": str(tmp_path / "store"),
        "profile": str(ROOT / "configs" / "tiny_mixtral.json"), "eviction": "next_token",
    }  # fmt: skip
    args = {"kv_cache_memory_bytes": 8 << 20}
    answers = []
    for model, more in (("org/m", {"download_dir": str(tmp_path / "downloads")}), (str(TINY_MIXTRAL), {})):
        run = subprocess.run(
            [sys.executable, RUN_OFFLINE, model, json.dumps(config), json.dumps(args | more)],
            capture_output=True, text=True,
            env=os.environ | {
                "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
            },
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        answers.append(json.loads(run.stdout.splitlines()[-1])["tokens"])
    assert answers[0] == answers[1]
    assert "using the packed experts" in run.stdout + run.stderr
    assert (tmp_path / "downloads" / "models--org--m" / "snapshots" / COMMIT / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["experts-0-of-1.pack"]
