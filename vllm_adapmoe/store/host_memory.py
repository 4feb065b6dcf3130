"""Host memory available to this process, limited by the machine or by a control group.

Standard library only. `/proc/meminfo` describes the whole machine, not the limit of a container.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class HostMemory:
    """Host memory that can still be allocated, and what limits it."""

    available: int
    """Available bytes."""
    limited_by: str
    """The limit, for a message: `this machine`, or a control group's file with its limit."""


@dataclass(frozen=True)
class GroupLimit:
    """Memory limit of one control group, shared by all processes in it and in the groups below."""

    file: Path
    limit: int
    """Limit in bytes, page cache included."""
    unreclaimable: int
    """Bytes in use that the kernel cannot reclaim by dropping file pages."""

    @property
    def available(self) -> int:
        return max(0, self.limit - self.unreclaimable)


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Returns the minimum of the machine's available memory and what each control group of this process has left.

    Args:
        root: folder of `proc` and `sys`; another one in tests.
    """
    lowest = HostMemory(_meminfo(root)["MemAvailable"], "this machine")
    for group in group_limits(root):
        if group.available < lowest.available:
            lowest = HostMemory(group.available, f"{group.file} = {group.limit / 2**30:.2f} GiB")
    return lowest


def memory_limit(root: Path = Path("/")) -> int | None:
    """Returns the lowest control group limit on this process, in bytes; None: no limit below the machine's memory."""
    lowest = min((group.limit for group in group_limits(root)), default=None)
    return None if lowest is None or lowest > _meminfo(root)["MemTotal"] else lowest


def group_limits(root: Path = Path("/")) -> Iterator[GroupLimit]:
    """Yields the limits of this process's control group and of all groups above it, as far as they are visible.

    cgroup v2 (`Documentation/admin-guide/cgroup-v2.rst` of Linux): one tree, `memory.max`, `memory.current`; above
    `memory.high` processes are throttled until pages are reclaimed, which for experts means forever. v1
    (`cgroup-v1/memory.rst`): a tree of the memory controller, `memory.limit_in_bytes`, `memory.usage_in_bytes`. In a
    container the path may be one of the host's tree of which only the top is mounted: then the top is read.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        if controllers:
            top /= "memory" if (top / "memory").is_dir() else controllers
        names = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(names), -1, -1):
            for name in ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high"):
                with suppress(OSError, ValueError, KeyError):  # "max" is no limit; the root group has no such file
                    yield _limit(top.joinpath(*names[:depth]) / name, v1=bool(controllers))


def _limit(file: Path, v1: bool) -> GroupLimit:
    folder = file.parent
    limit = int(file.read_text())
    used = int((folder / ("memory.usage_in_bytes" if v1 else "memory.current")).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    total = "total_" if v1 else ""  # v1 counts the groups below separately, v2 always includes them
    cached = sum(int(stat[f"{total}{name}"]) for name in ("inactive_file", "active_file"))
    return GroupLimit(file, limit, max(0, used - cached))


def _meminfo(root: Path) -> dict[str, int]:
    """Returns the entries of `/proc/meminfo` in bytes, by name."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}
