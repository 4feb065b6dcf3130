"""MODEL of a command as a hub's name: what is downloaded, and what is said where nothing can be."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MIXTRAL
from small_hub import COMMIT, SmallHub

pytestmark = pytest.mark.engine

ADAPMOE = Path(sys.executable).parent / "adapmoe"
SPEEDS = ("--link", 1, "--compute", 0.5)
DESCRIBE = """
import json
from vllm_adapmoe.integration.loading.model_files import checkpoint_folder
from vllm_adapmoe.integration.measure.engine import describe_model
folder = checkpoint_folder("org/m", "v2")
info = describe_model(folder)
print(json.dumps([str(folder), info.name, info.hash]))
"""
# One process for several commands: importing vLLM takes most of the time of each.
SEVERAL = """
import json, sys
from vllm_adapmoe.cli.app import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["adapmoe", *map(str, command)]
    try:
        main()
    except SystemExit as end:
        assert end.code == 1, (command, end.code)
"""


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    """A hub that serves the bundled model as `org/m`."""
    hub = SmallHub(TINY_MIXTRAL)
    yield hub
    hub.close()


def ran(hub: SmallHub, cache: Path, *command: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
    hub_settings = {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "COLUMNS": "100",
    }  # fmt: skip
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | hub_settings)


def names(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models--org--m" / "snapshots" / COMMIT).iterdir()}


def test_a_plan_downloads_the_configuration_alone(tmp_path, hub):
    command = (ADAPMOE, "plan", "org/m", "--revision", "v2", "--profile", "tiny_mixtral", *SPEEDS)
    run = ran(hub, tmp_path, *command, "--result", tmp_path / "result.json")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "org/m: experts" in run.stdout and "96 experts of 0.2 MiB" in run.stdout
    assert json.loads((tmp_path / "result.json").read_text())["model"] == "org/m"
    assert names(tmp_path) == {"config.json"}
    assert any("v2" in request for request in hub.requests)
    # From then on neither the hub nor a network is asked.
    hub.requests.clear()
    again = ran(hub, tmp_path, *command, offline=True)
    assert again.returncode == 0 and again.stdout == run.stdout and hub.requests == []


def test_a_whole_model_is_that_of_its_folder(tmp_path, hub):
    run = ran(hub, tmp_path, sys.executable, "-c", DESCRIBE)
    assert run.returncode == 0, run.stderr[-2000:]
    folder, name, value = json.loads(run.stdout.splitlines()[-1])
    assert Path(folder) == tmp_path / "models--org--m" / "snapshots" / COMMIT
    assert name == "m"
    assert value == json.loads((ROOT / "configs" / "tiny_mixtral.json").read_text())["model"]["hash"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names(tmp_path)


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_nowhere_is_one_line(tmp_path, hub, offline):
    nowhere = (
        ("plan", "org/nowhere", *SPEEDS),
        ("plan", "no name of a hub", *SPEEDS),
        ("plan", "/no/such/folder", *SPEEDS),
        ("evaluate", "org/nowhere", "--profile", "tiny_mixtral", "--data", "."),
        ("calibrate", "org/nowhere", "--data", ".", "-o", "never-written"),
        ("pack", "org/nowhere"),
        ("pack", "no name of a hub"),
    )
    run = ran(hub, tmp_path, sys.executable, "-c", SEVERAL, json.dumps(nowhere), offline=offline)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-2000:]
    errors = [line for line in run.stderr.splitlines() if line.startswith("adapmoe: error: ")]
    assert len(errors) == len(nowhere)
    for error, (_, model, *_) in zip(errors, nowhere, strict=True):
        assert error.startswith(f"adapmoe: error: model={model!r}"), error


def test_commands_serve_a_model_of_a_hub(tmp_path, hub):
    data = tmp_path / "text"
    data.mkdir()
    (data / "a.txt").write_text((ROOT / "examples" / "tiny_mixtral" / "heldout" / "python.txt").read_text()[:20_000])
    result = tmp_path / "result.json"
    found = ran(hub, tmp_path / "hub", ADAPMOE, "doctor", "--model", "org/m", "--json")
    assert json.loads(found.stdout)["serves"], found.stdout
    assert "model.safetensors" not in names(tmp_path / "hub")
    run = ran(
        hub, tmp_path / "hub", ADAPMOE, "evaluate", "org/m", "--profile", "tiny_mixtral", "--data", data,
        "--thresholds", "0.003", "--tokens", 512, "--sequence-length", 64, "-o", result,
        "--adapmoe-config.store_dir", tmp_path / "store",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (point,) = [point for point in json.loads(result.read_text())["points"] if point["rule"] == "token"]
    assert 1 < point["mean_experts"] < 2
