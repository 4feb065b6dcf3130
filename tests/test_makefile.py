"""Which Python `make` takes: any that vLLM takes, whatever it is called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def told(folder: Path, pythons: dict[str, tuple[int, int]]) -> str:
    """What `make install` would run on a machine with these commands alone."""
    for tool in ("sh", "sed"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, version in pythons.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (*{version}, 0); $2"\n')
        script.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    run = subprocess.run(
        [shutil.which("make"), "-n", "install", f"VENV={folder}/venv"],
        cwd=ROOT, env=environment | {"PATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": (3, 13)}, "python3"),
        ({"python3": (3, 10), "python3.12": (3, 12)}, "python3.12"),
        ({"python3": (3, 15), "python3.14": (3, 14)}, "python3.14"),
        ({"python3": (3, 13), "python3.11": (3, 11)}, "python3.11"),
        ({"python3": (3, 10)}, None),
        ({"python3": (3, 15)}, None),
    ],
)
def test_make_finds_a_python_that_vllm_takes(tmp_path, pythons, taken):
    lines = told(tmp_path, pythons)
    if taken is None:
        assert 'test -n "" || ' in lines and "no Python 3.11 to 3.14 found" in lines
    else:
        assert f"{taken} -m venv {tmp_path}/venv" in lines
