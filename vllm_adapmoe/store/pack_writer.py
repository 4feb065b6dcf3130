"""Writes a packed file: streamed, synced, and named only when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import drop_cached, open_direct, write_full
from vllm_adapmoe.store.file import FileStore
from vllm_adapmoe.store.pack_index import PackIndex, digest, encode_head
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, align, aligned_empty

PARTIAL = ".partial"


class PackWriter:
    """Packs into `path`, by way of a partial file beside it that is locked while its writer lives.

    Args:
        path: the pack to be.
        identity: what it is made from.
        expected_bytes: of all records together; checked against the free space first.

    Raises:
        StoreError: the folder cannot be written, or has too little space.
    """

    def __init__(self, path: Path, identity: dict[str, str], expected_bytes: int) -> None:
        self.path = path
        self._index = PackIndex(identity)
        self._layers: dict[int, tuple[RecordLayout, int, list[bytes]]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if free < expected_bytes:
                raise StoreError(
                    f"{path} needs {expected_bytes} bytes, {free} are free; free some space or set another store_dir"
                )
            self._partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
            with _locked(path.parent):  # no other writer takes our new file for an abandoned one
                _remove_abandoned(path)
                self._fd, self._direct = open_direct(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreError(f"{path.parent} cannot be written ({error.strerror}); set another store_dir") from None
        self._end = ALIGNMENT

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        layout = RecordLayout.of(tensors)
        experts = next(iter(tensors.values())).shape[0]
        pieces = [
            (piece, tensors[piece.name].reshape(experts, -1).view(torch.uint8).view(experts, piece.nbytes))
            for piece in layout.pieces
        ]
        record = aligned_empty(layout.nbytes).zero_()
        start, digests = self._end, []
        for expert in range(experts):
            for piece, source in pieces:
                record[piece.offset : piece.offset + piece.nbytes] = source[expert]
            digests.append(digest(record.numpy().data))
            self._write(record, self._end)
            self._end += layout.nbytes
        if not self._direct:
            os.fdatasync(self._fd)
            drop_cached(self._fd)
        self._layers[layer] = (layout, start, digests)

    def seal(self) -> FileStore:
        for layer in range(len(self._layers)):
            layout, offset, digests = self._layers[layer]
            self._index.layouts.append(layout)
            self._index.offsets.append(offset)
            self._index.digests.append(digests)
        index = self._index.encode()
        self._write(_block(index), self._end)
        os.fsync(self._fd)
        self._write(_block(encode_head(self._end, index)), 0)
        os.fsync(self._fd)
        self._partial.rename(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        os.close(self._fd)
        return FileStore(self.path, self._index)

    def abort(self) -> None:
        self._partial.unlink(missing_ok=True)

    def _write(self, data: torch.Tensor, offset: int) -> None:
        try:
            write_full(self._fd, data, offset)
        except OSError as error:
            self.abort()
            raise StoreError(f"{self.path} cannot be written ({error.strerror}); free some space there") from None


def _block(data: bytes) -> torch.Tensor:
    """`data` in aligned memory, padded with zeros to whole blocks."""
    block = aligned_empty(align(len(data))).zero_()
    block[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return block


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_abandoned(path: Path) -> None:
    """Deletes partial files whose writers were killed: nobody holds their locks any more."""
    for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):
        try:
            fd = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
