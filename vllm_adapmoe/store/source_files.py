"""SourceFiles: the files that a model is loaded from, identified by hashes of all their bytes."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file_hash import HashCache, Stamp, hash_bytes
from vllm_adapmoe.units import GiB

logger = logging.getLogger(__name__)

THREADS = 4
"""Number of files hashed at a time. One thread hashes 2.1 GB/s from the page cache of a cloud machine with AVX-512."""
BAR_SECONDS = 3
"""Duration from which hashing shows a progress bar and is logged."""


@dataclass(frozen=True)
class SourceFile:
    """A source file of a pack, as it was when the pack was made."""

    name: str
    hash: str
    stamp: Stamp | None
    """Stamp of the file; None: it was too new for its stamp to reveal a change."""


class SourceFiles:
    """Current files of one model: its weights, and the settings that determine how they are packed.

    Args:
        origin: location of the model, the same at every start: its folder.
        paths: file paths by name within the model, in loading order.
        hashes: cache of hashes of files read before.

    Raises:
        StoreError: a file is missing.
    """

    def __init__(self, origin: str, paths: Mapping[str, Path], hashes: HashCache) -> None:
        self.origin = origin
        self._paths = dict(paths)
        self._cache = hashes
        self._now = time.time_ns()
        self._stamps = {name: self._stamp(name) for name in self._paths}
        self._hashes: dict[str, str] = {}
        self._running: tuple[ThreadPoolExecutor, dict[str, Future[str]]] | None = None
        self._stop = threading.Event()

    def _stamp(self, name: str) -> Stamp:
        try:
            return Stamp.of(self._paths[name])
        except OSError as error:
            raise StoreError(
                f"{str(self._paths[name])!r} cannot be read ({error.strerror}); complete the model and start again"
            ) from None

    @property
    def nbytes(self) -> int:
        """Total bytes of all files."""
        return sum(stamp.nbytes for stamp in self._stamps.values())

    def stamps(self) -> dict[str, Stamp | None]:
        """Returns the stamp of each file by name; None where it is too new to reveal a change."""
        return {name: stamp if stamp.is_settled(self._now) else None for name, stamp in self._stamps.items()}

    def difference(self, recorded: Sequence[SourceFile]) -> str | None:
        """Describes the first file that differs from a pack's source files; None: all bytes are the same.

        Reads a file only if its stamp differs from the recorded one and its hash is not cached.

        Raises:
            StoreError: a file cannot be read.
        """
        recorded_files = {source.name: source for source in recorded}
        for name in sorted(recorded_files.keys() ^ self._stamps.keys()):
            return f"{name!r} is {'missing' if name in recorded_files else 'new'}"
        doubtful = []
        for name, stamp in self._stamps.items():
            recorded_stamp = recorded_files[name].stamp
            if recorded_stamp is not None and recorded_stamp == stamp:
                self._hashes[name] = recorded_files[name].hash
            elif recorded_stamp is not None and recorded_stamp.nbytes != stamp.nbytes:
                return f"{name!r} has {stamp.nbytes} bytes, {recorded_stamp.nbytes} before"
            else:
                doubtful.append(name)
        self._hash(doubtful)
        return next(
            (f"{name!r} has other bytes" for name in doubtful if self._hashes[name] != recorded_files[name].hash), None
        )

    def model_hash(self) -> str:
        """Returns the hash of all files' names and bytes.

        Raises:
            StoreError: a file cannot be read.
        """
        self._hash(list(self._paths))
        return hash_bytes("".join(f"{self._hashes[name]} {name}\n" for name in sorted(self._hashes)).encode())

    def check_unchanged(self) -> None:
        """Checks that no file has changed since this object was created.

        Raises:
            StoreError: a file has changed.
        """
        for name, stamp in self._stamps.items():
            if self._stamp(name) != stamp:
                raise StoreError(
                    f"{str(self._paths[name])!r} has changed while the model was being loaded; start again"
                )

    # While the model is loaded

    def start_hashing(self, cpus: set[int]) -> None:
        """Starts hashing in the background, on `cpus`, in loading order, so that both share the page cache."""
        assert self._running is None
        threads = ThreadPoolExecutor(THREADS, "hash", lambda: os.sched_setaffinity(0, cpus))
        unhashed = [name for name in self._paths if name not in self._hashes]
        self._running = threads, {name: threads.submit(self._hash_file, name, self._count) for name in unhashed}

    def stop_hashing(self) -> None:
        """Stops background hashing."""
        if self._running is not None:
            self._stop.set()
            self._running[0].shutdown(cancel_futures=True)
            self._running = None

    def sources(self) -> list[SourceFile]:
        """Returns the source files to record in a pack, sorted by name; waits for their hashes.

        Raises:
            StoreError: a file cannot be read, or has changed since this object was created.
        """
        if self._running is not None:
            threads, futures = self._running
            if not all(future.done() for future in futures.values()):
                logger.warning("Waiting for the remaining files of %s to be hashed", self.origin)
            self._hashes |= {name: future.result() for name, future in futures.items()}
            threads.shutdown()
            self._running = None
        else:
            self._hash(list(self._paths))
        self.check_unchanged()
        stamps = self.stamps()
        return [SourceFile(name, self._hashes[name], stamps[name]) for name in sorted(stamps)]

    def _count(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise StoreError("stopped")

    # Hashing

    def _hash_file(self, name: str, count: Callable[[int], object]) -> str:
        try:
            return self._cache.hash_of(self._paths[name], self._stamps[name], count)[0]
        except OSError as error:
            raise StoreError(f"{str(self._paths[name])!r} cannot be read ({error.strerror}); check the disk") from None

    def _hash(self, names: Sequence[str]) -> None:
        """Hashes those files that are not hashed yet, with a progress bar; blocks."""
        names = [name for name in names if name not in self._hashes]
        if not names:
            return
        start, total = time.monotonic(), sum(self._stamps[name].nbytes for name in names)
        with _bar(total) as count, ThreadPoolExecutor(min(THREADS, len(names)), "hash") as threads:
            self._hashes |= dict(zip(names, threads.map(lambda name: self._hash_file(name, count), names), strict=True))
        seconds = time.monotonic() - start
        if seconds > BAR_SECONDS:
            logger.warning("Identified %s: hashed %.2f GiB of files in %.0f s", self.origin, total / GiB, seconds)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar if hashing takes long; yields a function to call with the bytes hashed."""
    lock = threading.Lock()
    with tqdm(total=total, desc="Identifying weights", unit="B", unit_scale=True, delay=BAR_SECONDS) as bar:

        def count(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield count
