"""A memory limit for a process tree, by cgroup v1 or v2."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


def why_not() -> str | None:
    """The reason why no limit can be set here; None if it can."""
    if (V1 / "memory.limit_in_bytes").exists():
        return None if os.access(V1, os.W_OK) else f"{V1} is not writable"
    controllers = ROOT / "cgroup.controllers"
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        return "no memory controller in cgroup v1 or v2"
    return None if os.access(ROOT, os.W_OK) else f"{ROOT} is not writable"


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Path]:
    """A group whose processes together may use `nbytes`; yields the file that takes a process into it."""
    v1 = V1.exists()
    group = (V1 if v1 else ROOT) / f"adapmoe-test-{os.getpid()}"
    if not v1:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(nbytes))
    if not v1:
        (group / "memory.swap.max").write_text("0")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
