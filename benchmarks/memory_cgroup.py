"""Limits the memory of a process tree by cgroup v1 or v2, and reads how much it used."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


def why_not() -> str | None:
    """Returns the reason why no limit can be set here; None if it can."""
    if (V1 / "memory.limit_in_bytes").exists():
        return None if os.access(V1, os.W_OK) else f"{V1} is not writable"
    controllers = ROOT / "cgroup.controllers"
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        return "no memory controller in cgroup v1 or v2"
    return None if os.access(ROOT, os.W_OK) else f"{ROOT} is not writable"


@dataclass(frozen=True)
class MemoryGroup:
    """A group of processes that share a memory limit."""

    folder: Path
    v1: bool

    @property
    def procs(self) -> Path:
        """File that lists the processes in the group; a process id written to it joins the group."""
        return self.folder / "cgroup.procs"

    def pids(self) -> list[int]:
        return [int(line) for line in self.procs.read_text().split()]

    def peak_bytes(self) -> int | None:
        """Returns peak memory use, page cache included; None if the kernel does not report it."""
        path = self.folder / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")
        return int(path.read_text()) if path.exists() else None

    def unreclaimable_bytes(self) -> int:
        """Returns memory in use that cannot be reclaimed without swapping: anonymous and shared memory."""
        stat = _numbers(self.folder / "memory.stat")
        return stat["rss"] + stat.get("shmem", 0) if self.v1 else stat["anon"] + stat["shmem"]

    def kills(self) -> int:
        """Returns how many processes of the group the kernel killed because the limit was reached."""
        return _numbers(self.folder / ("memory.oom_control" if self.v1 else "memory.events")).get("oom_kill", 0)


def _numbers(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


@contextmanager
def limited_memory(nbytes: int) -> Iterator[MemoryGroup]:
    """Creates a group whose processes together may use `nbytes`, page cache included, and no swap."""
    v1 = V1.exists()
    group = MemoryGroup((V1 if v1 else ROOT) / f"adapmoe-{os.getpid()}", v1)
    if not v1:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    group.folder.mkdir()
    (group.folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(nbytes))
    if not v1:
        (group.folder / "memory.swap.max").write_text("0")
    try:
        yield group
    finally:
        group.folder.rmdir()
