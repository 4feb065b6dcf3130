"""Writes benchmark results as JSON, with the command, versions and machine needed to reproduce them."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

Item = TypeVar("Item")
PACKAGES = ("vllm-adapmoe", "vllm", "torch", "transformers", "numpy")


def package_version(package: str) -> str | None:
    """Returns the version of an installed distribution; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the git commit of this package's checkout, with "+" if files were changed since; None: unknown."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _program() -> str:
    """Returns the program as the user called it: the name of a script, or `python -m` and the name of a module."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def environment() -> dict[str, Any]:
    """Returns the command, versions, commit and machine of this run."""
    return {
        "command": " ".join([_program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {package: package_version(package) for package in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "kernel": platform.release(),
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, minimum, maximum and number of repeated measurements."""
    return {"median": median(values), "min": min(values), "max": max(values), "runs": len(values)}


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Rotates the items by `turn`, so that each comes first in some round: the first may be favoured."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result with its environment, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n")
    temporary.replace(path)
