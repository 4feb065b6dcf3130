"""CI after the newest vLLM: one of the others in turn; one that cannot be installed is skipped, and said so."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

MAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
    *other-vllms*) echo 0.30.0 0.31.0 ;;
    *install*) exit "$INSTALL" ;;
    test-vllm*) exit "$TEST" ;;
    test) exit "$NEWEST" ;;
esac
"""


def ci(folder: Path, commits: int, **codes: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs `.ci/run` where `make` and `git` are made up; returns it and what it asked `make` for."""
    for name, text in (("make", MAKE), ("git", f"#!/bin/sh\necho {commits}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for tool in ("bash", "dirname", "timeout"):
        (folder / tool).symlink_to(shutil.which(tool))
    codes = {"INSTALL": 0, "TEST": 0, "NEWEST": 0} | codes
    environment = {"PATH": str(folder), "CALLS": str(folder / "calls")} | {
        key: str(code) for key, code in codes.items()
    }
    run = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, cwd=os.sep)
    return run, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("commits", "version"), [(10, "0.30.0"), (11, "0.31.0"), (12, "0.30.0")])
def test_one_of_the_others_in_turn(tmp_path, commits, version):
    run, calls = ci(tmp_path, commits)
    assert run.returncode == 0, run.stderr
    assert calls[0] == "test" and calls[-1] == f"test-vllm VERSION={version}"


def test_one_that_cannot_be_installed_is_skipped_and_said_so(tmp_path):
    run, calls = ci(tmp_path, 11, INSTALL=2)
    assert run.returncode == 0
    assert "SKIPPED: vLLM 0.31.0" in run.stdout
    assert not any(call.startswith("test-vllm") for call in calls)


@pytest.mark.parametrize("failing", ["NEWEST", "TEST"])
def test_a_failing_test_fails(tmp_path, failing):
    run, _ = ci(tmp_path, 11, **{failing: 2})
    assert run.returncode == 2


def test_one_that_comes_to_no_end_is_said(tmp_path):
    run, _ = ci(tmp_path, 11, TEST=124)
    assert run.returncode == 0 and "NOT FINISHED in time: the tests with vLLM 0.31.0" in run.stdout
