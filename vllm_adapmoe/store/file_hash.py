"""Hashes of whole files, each read once on a machine: remembered while size, times and inode of the file stay."""

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
"""A file's clock ticks in steps of up to two seconds (FAT; ext4 and NFS are finer): a file that was changed within one
step of being read may change again without another time, so its stamp proves nothing."""
HASH_CHARACTERS = 32
ENTRY_BYTES = 4096


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file: any way to change its bytes changes one of these.

    `ctime_ns` cannot be set back, as `cp -p` or rsync set `mtime_ns`.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The stamp of the file that `path` leads to.

        Raises:
            OSError: as the system says.
        """
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after `now_ns` would change the stamp."""
        return max(self.mtime_ns, self.ctime_ns) + SETTLED_NS < now_ns


def hash_bytes(data: bytes) -> str:
    """The hash of what is in memory, as that of a file."""
    return blake3(data).hexdigest()[:HASH_CHARACTERS]


def hash_file(path: Path, count: Callable[[int], object]) -> str:
    """Hash of every byte of a file, read in blocks; `count` is told the bytes of each.

    Raises:
        OSError: as the system says, or it is no regular file.
    """
    digest, block = blake3(max_threads=1), bytearray(BLOCK)
    view = memoryview(block)
    with FileIO(open_regular(path)) as file:
        while nbytes := file.readinto(block):
            digest.update(view[:nbytes])
            count(nbytes)
    return digest.hexdigest()[:HASH_CHARACTERS]


class HashCache:
    """Remembers hashes in files of `folder`, one for each hashed file, named by the hash of its path.

    An entry is locked while its file is read: other processes wait, and read it from the entry. Entries that others
    may write are not believed. Where the folder cannot be used, files are read each time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hash_of(self, path: Path, stamp: Stamp, count: Callable[[int], object]) -> tuple[str, bool]:
        """The hash of a file with this stamp, and whether the file was read for it; `count` as in `hash_file`.

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
                _log_unusable(self.folder, "others may write there")
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
        return None  # new, or torn by a process that was killed


def _write_entry(fd: int, path: Path, stamp: Stamp, value: str) -> None:
    entry = json.dumps({"path": path.name, "hash": value} | asdict(stamp)).encode()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, entry, 0)
    except OSError as error:
        logger.debug("%s is not remembered: %s", path, error)


@cache
def _log_unusable(folder: Path, reason: str) -> None:
    """Once for a folder."""
    logger.warning(
        "%s cannot keep the hashes of weight files (%s): where a pack does not know them they are read at each start; "
        "set VLLM_CACHE_ROOT to a folder of your own", folder, reason,
    )  # fmt: skip
