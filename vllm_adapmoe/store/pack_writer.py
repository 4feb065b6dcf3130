"""Writes a packed file: streamed, synced, and named only when it is whole."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import torch

from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import drop_cached, open_direct, write_full
from vllm_adapmoe.store.file import FileStore, open_pack
from vllm_adapmoe.store.pack_index import PackIndex, digest, encode_head
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, align, aligned_empty

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PackWriter:
    """Packs into `path`, by way of a partial file beside it that is locked while its writer lives.

    There is one writer of a pack at a time. A second one waits; if the first has finished the same pack by then, that
    one is used and nothing is written. What a killed writer left is overwritten.

    Args:
        path: the pack to be.
        identity: what it is made from.
        expected_bytes: of all records together; checked against the free space first.

    Raises:
        StoreError: the folder cannot be written, or has too little space.
    """

    def __init__(self, path: Path, identity: dict[str, str], expected_bytes: int) -> None:
        self.path = path
        self._expected_bytes = expected_bytes
        self._index = PackIndex(identity)
        self._layers: dict[int, tuple[RecordLayout, int, list[bytes]]] = {}
        self._finished: FileStore | None = None
        self._record: tuple[RecordLayout, torch.Tensor] | None = None
        self._partial = path.with_name(path.name + PARTIAL)
        self._end = ALIGNMENT
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._direct, waited = _open_locked(self._partial)
            os.ftruncate(self._file.fileno(), 0)  # what a killed writer left counts as free space
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            raise StoreError(f"{path.parent} cannot be written ({error.strerror}); set another store_dir") from None
        if waited and self._find_finished():
            self.abort()
        elif free < expected_bytes:
            self.abort()
            raise StoreError(
                f"{path} needs {expected_bytes} bytes, {free} are free; free some space or set another store_dir"
            )

    def _find_finished(self) -> bool:
        """Whether the writer that was waited for made this very pack."""
        try:
            self._finished = open_pack(self.path, self._index.identity)
        except StoreError:
            return False
        return True

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        layout = RecordLayout.of(tensors)
        if self._finished is not None:
            if layout != self._finished.layouts[layer]:
                raise StoreError(f"{self.path} holds MoE layer {layer} in another kernel format; delete it")
            return
        experts = next(iter(tensors.values())).shape[0]
        pieces = [
            (piece, tensors[piece.name].reshape(experts, -1).view(torch.uint8).view(experts, piece.nbytes))
            for piece in layout.pieces
        ]
        record = self._record_of(layout)
        start, digests = self._end, []
        try:
            for expert in range(experts):
                for piece, source in pieces:
                    record[piece.offset : piece.offset + piece.nbytes] = source[expert]
                digests.append(digest(record.numpy().data))
                write_full(self._file.fileno(), record, self._end)
                self._end += layout.nbytes
            if not self._direct:
                os.fdatasync(self._file.fileno())
                drop_cached(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None
        self._layers[layer] = (layout, start, digests)

    def _record_of(self, layout: RecordLayout) -> torch.Tensor:
        # Kept from layer to layer: malloc was seen to hold on to eight records when each layer allocated its own. The
        # padding between pieces is never written, so it stays zero.
        if self._record is None or self._record[0] != layout:
            self._record = (layout, aligned_empty(layout.nbytes).zero_())
        return self._record[1]

    def seal(self) -> FileStore:
        if self._finished is not None:
            return self._finished
        for layer in range(len(self._layers)):
            layout, offset, digests = self._layers[layer]
            self._index.layouts.append(layout)
            self._index.offsets.append(offset)
            self._index.digests.append(digests)
        index = self._index.encode()
        fd = self._file.fileno()
        try:
            write_full(fd, _block(index), self._end)
            os.fsync(fd)
            write_full(fd, _block(encode_head(self._end, index)), 0)
            os.fsync(fd)
            pack, direct = open_direct(self._partial, os.O_RDONLY)
            store = FileStore(self.path, FileIO(pack), direct, self._index)
            self._partial.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None
        self._file.close()  # only now may a waiting writer look
        return store

    def abort(self) -> None:
        if not self._file.closed:  # else it is sealed or aborted, and a partial file there is another writer's
            self._partial.unlink(missing_ok=True)
            self._file.close()

    def _failed(self, error: OSError) -> StoreError:
        """Aborts; what is to be raised."""
        free = shutil.disk_usage(self.path.parent).free
        self.abort()
        remedy = "check the disk"
        if error.errno in NO_SPACE:
            remedy = f"of {self._expected_bytes} bytes {self._end} are written, {free} are free; free some space there"
        return StoreError(f"{self.path} cannot be written ({error.strerror}); {remedy}")


def _open_locked(partial: Path) -> tuple[FileIO, bool, bool]:
    """Opens a partial file for one writer alone; returns it, whether it is direct, and whether it had to be waited for.

    The lock is on the file itself, and goes with the process that holds it: neither a process id, which means nothing
    in another container, nor a lock file that somebody has to remove.
    """
    waited = False
    while True:
        fd, direct = open_direct(partial, os.O_WRONLY | os.O_CREAT)
        file = FileIO(fd, "w")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s is being written by another process; waiting for it", partial.with_suffix(""))
            waited = True
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(partial.stat(), os.fstat(fd)):
                return file, direct, waited
        except FileNotFoundError:
            pass
        file.close()  # the writer that was waited for has sealed or aborted: its file is no longer the partial one


def _block(data: bytes) -> torch.Tensor:
    """`data` in aligned memory, padded with zeros to whole blocks."""
    block = aligned_empty(align(len(data))).zero_()
    block[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return block


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
