"""Direct I/O: reads and writes that bypass the page cache where the file system allows it.

A packed file is as big as the model: its cached pages would use up the memory limit.
"""

import errno
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from vllm_adapmoe.files import open_regular
from vllm_adapmoe.store.record import ALIGNMENT

logger = logging.getLogger(__name__)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Opens `path`, with O_DIRECT if the file system supports it; returns the descriptor and whether it does."""
    try:
        return open_regular(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _log_buffered(path.parent)
        return open_regular(path, flags), False


@cache
def _log_buffered(folder: Path) -> None:
    """Logs, once per folder, that direct I/O is not available."""
    logger.warning("%s does not support direct I/O; experts are read through the page cache", folder)


def is_aligned(buffers: Sequence[torch.Tensor]) -> bool:
    """Returns whether each uint8 buffer starts at a block boundary and fills whole blocks, as direct I/O requires."""
    return all(buffer.data_ptr() % ALIGNMENT == 0 and buffer.numel() % ALIGNMENT == 0 for buffer in buffers)


def read_full(fd: int, buffers: Sequence[torch.Tensor], offset: int) -> int:
    """Reads into flat uint8 buffers in turn, from `offset` on; returns the bytes read, fewer only at the file's end.

    Raises:
        OSError: the read failed.
    """
    views = [buffer.numpy().data for buffer in buffers]
    total = sum(map(len, views))
    done = 0
    while done < total:
        count = os.preadv(fd, views, offset + done)
        if count == 0:
            break
        done += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views and count:
            views[0] = views[0][count:]
    return done


def write_full(fd: int, data: torch.Tensor, offset: int) -> None:
    """Writes a uint8 buffer at `offset`.

    Raises:
        OSError: the write failed, e.g. because the disk is full.
    """
    view = data.numpy().data
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def drop_cached(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    """Drops pages that buffered I/O left in the page cache; `nbytes` 0: up to the end.

    Only written-back pages can be dropped.
    """
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
