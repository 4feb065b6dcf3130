"""What is built from this repository: the wheel has everything that runs, and serves from an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT, TINY_MIXTRAL

from benchmarks import server

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
PROFILES = {file.name for file in (ROOT / "configs").iterdir() if file.suffix in (".json", ".heads")}


def output_of(*command: object, cwd: Path) -> str:
    """What a command prints, in a folder of its own and without this test's import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the wheel and the source distribution of a copy of this repository."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=LEFT_OUT)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    output_of(*pip, ".", cwd=folder / "copy")
    sdist = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    output_of(sys.executable, "-c", sdist, folder, cwd=folder / "copy")
    return folder


def test_a_wheel_has_the_package_and_its_profiles(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_adapmoe").rglob("*.py")}
    assert names == sources | {"vllm_adapmoe/py.typed"} | {f"vllm_adapmoe/configs/{name}" for name in PROFILES}


def test_a_source_distribution_has_what_a_wheel_is_built_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {f"vllm_adapmoe/configs/{name}" for name in PROFILES} <= files
    assert {"pyproject.toml", "README.md", "LICENSE", "vllm_adapmoe/py.typed", "vllm_adapmoe/cli/app.py"} <= files


@pytest.fixture
def installed(built, tmp_path) -> Path:
    """The `bin` of a fresh environment with the wheel, beside the vLLM that runs these tests."""
    (wheel,) = built.glob("*.whl")
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    output_of(sys.executable, "-m", "venv", "--without-pip", venv, cwd=empty)
    python = venv / "bin" / "python"
    output_of(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel,
        cwd=empty,
    )  # fmt: skip
    (site,) = venv.glob("lib/python*/site-packages")
    # Of a folder that is named so, its own .pth files are not followed: not our editable installation's.
    (site / "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


@pytest.mark.engine
def test_a_wheel_serves_beside_vllm(installed, tmp_path, monkeypatch):
    empty, adapmoe = tmp_path / "empty", installed / "adapmoe"
    where = output_of(installed / "python", "-c", "import vllm_adapmoe; print(vllm_adapmoe.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(installed.parent), where
    assert "plan" in output_of(adapmoe, "--help", cwd=empty)
    planned = output_of(
        adapmoe, "plan", TINY_MIXTRAL, "--profile", "tiny_mixtral", "--link", 1, "--compute", 0.5,
        "--max-loss-increase", 0.005, cwd=empty,
    )  # fmt: skip
    assert "gated" in planned and "assumed" not in planned
    found = json.loads(output_of(adapmoe, "doctor", "--model", TINY_MIXTRAL, "--json", cwd=empty))
    assert found["serves"], found

    monkeypatch.chdir(empty)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(server, "VLLM", [installed / "python", "-m", "vllm.entrypoints.cli.main"])
    config = {
        "cache_fraction": 0.5, "store_dir": str(tmp_path / "store"), "profile": "tiny_mixtral",
        "gating": {"mode": "token", "max_loss_increase": 0.005},
    }  # fmt: skip
    flags = ("--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(8 << 20))
    with server.Server("wheel", TINY_MIXTRAL, tmp_path, config, flags) as serving:
        answer = serving.complete(prompt="#include <", max_tokens=16, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 16
        counted = serving.metrics()
    assert counted["vllm:adapmoe_slots"] == 48
    assert counted["vllm:adapmoe_kept_experts_total"] < 2 * counted["vllm:adapmoe_gated_tokens_total"]
    assert list(empty.iterdir()) == []
