"""Samples memory, threads and open files of a server during a soak, and checks whether they grow."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import linear_regression, median
from typing import Any

import psutil

from benchmarks.server import Server
from vllm_adapmoe.units import MiB

EARLY = (0.15, 0.25)
"""Part of a soak that later memory is compared with; before it, the server warms up."""
LATE = (0.9, 1.0)
GROWTH = 0.02
GROWTH_BYTES = 20 * MiB
"""Memory may grow by the greater of the two."""
SPARE_HANDLES = 0
"""Additional threads and open files allowed to the idle server after the soak, compared with after the warm-up."""


@dataclass(frozen=True)
class Sample:
    """Resources of all processes of a server together."""

    seconds: float
    """Time since the soak began."""
    anonymous: int
    """Resident bytes that are neither file-backed nor shared."""
    proportional: int
    """Proportional set size (PSS): resident bytes, with shared ones divided by the number of sharers."""
    threads: int
    files: int
    processes: int
    anonymous_of: dict[str, int] = field(default_factory=dict)
    """`anonymous` by process name."""


def sample(server: Server, started: float) -> Sample:
    """Takes a sample of the server's resources."""
    seconds = time.monotonic() - started
    by_name: dict[str, int] = {}
    anonymous = proportional = threads = files = processes = 0
    for process in server.processes():
        with suppress(psutil.Error, FileNotFoundError):
            memory = process.memory_full_info()
            anonymous += memory.rss - memory.shared
            name = process.name()
            by_name[name] = by_name.get(name, 0) + memory.rss - memory.shared
            proportional += memory.pss
            threads += process.num_threads()
            files += process.num_fds()
            processes += 1
    return Sample(seconds, anonymous, proportional, threads, files, processes, by_name)


class Watch:
    """Takes samples every `interval` seconds in its own thread for the duration of the `with` block."""

    def __init__(self, server: Server, interval: float) -> None:
        self.server = server
        self.interval = interval
        self.started = time.monotonic()
        self.samples: list[Sample] = []
        self.loaded = True
        """Whether there is traffic; without it, no samples are taken."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            if self.loaded:
                self.samples.append(sample(self.server, self.started))


def growth(samples: Sequence[Sample], idle: Sequence[Sample]) -> dict[str, Any]:
    """Computes growth of memory, threads, files and processes, and whether it is within limits.

    Args:
        samples: samples under load, over the whole soak.
        idle: samples without requests: after the warm-up, and at the end.
    """
    total = samples[-1].seconds
    parts = {
        name: [reading for reading in samples if low * total <= reading.seconds <= high * total]
        for name, (low, high) in {"early": EARLY, "late": LATE}.items()
    }
    warm = [reading for reading in samples if reading.seconds >= EARLY[0] * total]
    result: dict[str, Any] = {"idle": [asdict(reading) for reading in idle]}
    for key in ("anonymous", "proportional"):
        early, late = (
            median(getattr(reading, key) for reading in parts[name] or samples) for name in ("early", "late")
        )
        limit = max(GROWTH * early, GROWTH_BYTES)
        times = [reading.seconds / 60 for reading in warm]
        slope = (
            linear_regression(times, [getattr(reading, key) for reading in warm]).slope if len(set(times)) > 1 else 0.0
        )
        result[key] = {
            "early_bytes": early,
            "late_bytes": late,
            "growth_bytes": late - early,
            "limit_bytes": limit,
            "bytes_per_minute": slope,
            "within": late - early <= limit,
        }
    result["anonymous"]["growth_bytes_of"] = {name: _between(parts, name, samples) for name in samples[-1].anonymous_of}
    for key in ("threads", "files", "processes"):
        before, after = getattr(idle[0], key), getattr(idle[-1], key)
        result[key] = {"before": before, "after": after, "within": after <= before + SPARE_HANDLES}
    return result


def _between(parts: dict[str, list[Sample]], name: str, samples: Sequence[Sample]) -> float:
    """Returns the memory growth of all processes of a name, bytes."""
    early, late = (
        median(reading.anonymous_of.get(name, 0) for reading in parts[part] or samples) for part in ("early", "late")
    )
    return late - early
