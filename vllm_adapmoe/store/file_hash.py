"""Hashes of whole files, cached on a machine while size, times and inode of the file are unchanged."""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Self

from blake3 import blake3

from vllm_adapmoe.files import open_regular

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
SETTLED_NS = 2_000_000_000
"""Minimum age of a file's times before its stamp is trusted. Timestamps have a resolution of up to two seconds (FAT;
ext4 and NFS are finer): a file modified within one step of being read may change again without a new timestamp."""
HASH_CHARACTERS = 32
ENTRY_BYTES = 4096


@dataclass(frozen=True)
class Stamp:
    """File metadata of which at least one field changes whenever the file's bytes change.

    `ctime_ns` cannot be set back, unlike `mtime_ns`, which `cp -p` and rsync set.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Returns the stamp of the file at `path`, links followed.

        Raises:
            OSError: the file is not accessible.
        """
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Returns whether a change after `now_ns` would change the stamp."""
        return max(self.mtime_ns, self.ctime_ns) + SETTLED_NS < now_ns


def hash_bytes(data: bytes) -> str:
    """Returns the hash of bytes in memory, equal to that of a file with these bytes."""
    return blake3(data).hexdigest()[:HASH_CHARACTERS]


def hash_file(path: Path, count: Callable[[int], object]) -> str:
    """Hashes every byte of a file, read in blocks; calls `count` with the bytes of each.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    digest, block = blake3(max_threads=1), bytearray(BLOCK)
    view = memoryview(block)
    with FileIO(open_regular(path)) as file:
        while nbytes := file.readinto(block):
            digest.update(view[:nbytes])
            count(nbytes)
    return digest.hexdigest()[:HASH_CHARACTERS]


class HashCache:
    """Caches hashes in `folder`, in one entry file per hashed file, named by the hash of its path.

    An entry is locked while its file is read: other processes wait and take the hash from the entry. Entries that other
    users may write are ignored. If the folder cannot be used, files are read each time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hash_of(self, path: Path, stamp: Stamp, count: Callable[[int], object]) -> tuple[str, bool]:
        """Returns the hash of a file with this stamp, and whether the file was read; `count` as in `hash_file`.

        Raises:
            OSError: the file cannot be read.
        """
        now = time.time_ns()
        with self._entry(path) as entry:
            known = None if entry is None else _read_entry(entry, stamp)
            if known is not None:
                count(stamp.nbytes)
                return known, False
            value = hash_file(path, count)
            if entry is not None and stamp.is_settled(now) and Stamp.of(path) == stamp:
                _write_entry(entry, path, stamp, value)
            return value, True

    @contextmanager
    def _entry(self, path: Path) -> Iterator[int | None]:
        name = hash_bytes(os.fsencode(os.path.realpath(path)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self.folder / f"{name}.json", flags, 0o600)
        except OSError as error:
            _log_unusable(self.folder, error.strerror or "")
            yield None
            return
        try:
            stat = os.fstat(fd)
            if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
                _log_unusable(self.folder, "other users may write to it")
                yield None
                return
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)


def _read_entry(fd: int, stamp: Stamp) -> str | None:
    try:
        entry = json.loads(os.pread(fd, ENTRY_BYTES, 0))
        value = str(entry.pop("hash"))
        entry.pop("path")
        return value if entry == asdict(stamp) and re.fullmatch("[0-9a-f]{32}", value) else None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None  # new, or left incomplete by a process that was killed


def _write_entry(fd: int, path: Path, stamp: Stamp, value: str) -> None:
    entry = json.dumps({"path": path.name, "hash": value} | asdict(stamp)).encode()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, entry, 0)
    except OSError as error:
        logger.debug("The hash of %s is not cached: %s", path, error)


@cache
def _log_unusable(folder: Path, reason: str) -> None:
    """Logs, once per folder, that hashes cannot be cached in it."""
    logger.warning(
        "Hashes of weight files cannot be cached in %s (%s): files that a pack has no stamp of are read at each start; "
        "set VLLM_CACHE_ROOT to a folder of your own", folder, reason,
    )  # fmt: skip
