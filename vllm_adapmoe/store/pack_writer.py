"""PackWriter: writes a packed file in a stream, renames it when complete, and resumes after a killed writer."""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from blake3 import blake3

from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import drop_cached, open_direct, read_full, write_full
from vllm_adapmoe.store.file import FileStore, open_pack
from vllm_adapmoe.store.file_hash import HashCache
from vllm_adapmoe.store.pack_index import DIGEST_SIZE, PackIndex, digest, encode_head
from vllm_adapmoe.store.pack_journal import Layer, PackJournal
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, align, aligned_empty
from vllm_adapmoe.store.source_files import SourceFiles

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
JOURNAL = ".journal"
TILE_BYTES = 4 << 20
PROBE_BYTES = 64 << 20
"""Maximum bytes written to measure the disk, in pieces, for at most `PROBE_SECONDS`."""
PROBE_SECONDS = 0.5
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PackWriter:
    """Writes the pack `path` through a partial file beside it, which is locked while its writer lives.

    A pack has one writer at a time. A second one waits; if the first has then finished the same pack, that one is used
    and nothing is written. After a killed writer of the same pack, writing resumes after its last complete layer, once
    every record of it has been verified.

    Args:
        path: path of the finished pack.
        identity: settings that it is made with.
        expected_bytes: total bytes of all records; checked against the free space first.
        sources: files that it is made from; None: none.

    Raises:
        StoreError: the folder cannot be written, or has too little space.
    """

    def __init__(
        self, path: Path, identity: dict[str, str], expected_bytes: int, sources: SourceFiles | None = None
    ) -> None:
        self.path = path
        self._expected_bytes = expected_bytes
        self._sources = SourceFiles("", {}, HashCache(path.parent)) if sources is None else sources
        self._index = PackIndex(identity, self._sources.origin)
        self._layers: dict[int, Layer] = {}
        self._finished: FileStore | None = None
        self._record: tuple[RecordLayout, torch.Tensor] | None = None
        self._partial = path.with_name(path.name + PARTIAL)
        self._journal = PackJournal(path.with_name(path.name + PARTIAL + JOURNAL), identity, self._sources)
        self._end = ALIGNMENT
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._direct, waited = _open_locked(self._partial)
        except OSError as error:
            raise self._unwritable(error) from None
        if waited and self._find_finished():
            self._give_up()
            return
        try:
            self._resume()
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            self._give_up()
            raise self._unwritable(error) from None
        needed = expected_bytes - self.bytes_packed
        if free < needed:
            if self._layers:
                self._file.close()  # for the next start, which may find more room
            else:
                self._give_up()
            raise StoreError(f"{path} needs {needed} bytes, {free} are free; free some space or set another store_dir")

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path.parent} cannot be written ({error.strerror}); set another store_dir")

    def _find_finished(self) -> bool:
        """Returns whether the writer that was waited for has finished the same pack."""
        try:
            store = open_pack(self.path, self._index.identity)
            store.check_sources(self._sources)
        except StoreError:
            return False
        self._finished = store
        return True

    def _resume(self) -> None:
        """Keeps the complete layers of a killed writer, in the order of the file, and truncates the rest."""
        for index, layer in self._journal.read().items():
            layout, offset, digests = layer
            if offset != self._end or index in self._layers or not self._is_whole(layer):
                break
            self._layers[index] = layer
            self._end += layout.nbytes * len(digests)
        os.ftruncate(self._file.fileno(), self._end if self._layers else 0)  # frees the space of incomplete layers
        self._journal.begin(self._layers)

    def _is_whole(self, layer: Layer) -> bool:
        layout, offset, digests = layer
        fd = self._file.fileno()
        if offset + layout.nbytes * len(digests) > os.fstat(fd).st_size:
            return False
        tile = aligned_empty(TILE_BYTES)  # not the record size that the journal claims, which may be anything
        for number, expected in enumerate(digests):
            hasher = blake3(max_threads=1)
            for start in range(0, layout.nbytes, TILE_BYTES):
                part = tile[: layout.nbytes - start]
                try:
                    count = read_full(fd, [part], offset + number * layout.nbytes + start)
                except OSError:
                    return False
                if count != len(part):
                    return False
                hasher.update(part.numpy().data)
            if hasher.digest(len(expected)) != expected or len(expected) != DIGEST_SIZE:
                return False
        return True

    @property
    def packed(self) -> Collection[int]:
        """Layers that need not be put: a killed writer, or one that was waited for, has written them."""
        return range(self._finished.num_layers) if self._finished is not None else self._layers.keys()

    def layout(self, layer: int) -> RecordLayout:
        """Returns the record layout of a packed layer."""
        return self._finished.layouts[layer] if self._finished is not None else self._layers[layer][0]

    @property
    def bytes_packed(self) -> int:
        """Bytes written so far, by this writer and a killed one before it."""
        return self._end - ALIGNMENT

    @property
    def bytes_left(self) -> int:
        """Bytes still to be written, according to `expected_bytes`."""
        return 0 if self._finished is not None else max(0, self._expected_bytes - self.bytes_packed)

    def measure_rate(self) -> float:
        """Measures the disk's write bandwidth, bytes per second, on the part of the file that is not written yet.

        Raises:
            StoreError: the file cannot be written.
        """
        piece = aligned_empty(TILE_BYTES).zero_()
        start, end = time.monotonic(), self._end
        try:
            while end - self._end < min(PROBE_BYTES, self.bytes_left) and time.monotonic() - start < PROBE_SECONDS:
                write_full(self._file.fileno(), piece, end)
                os.fdatasync(self._file.fileno())
                end += len(piece)
            seconds = time.monotonic() - start
            os.ftruncate(self._file.fileno(), self._end)
        except OSError as error:
            raise self._failed(error) from None
        return (end - self._end) / seconds

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        layout = RecordLayout.of(tensors)
        if self._finished is not None:
            if layout != self._finished.layouts[layer]:
                raise StoreError(f"{self.path} has MoE layer {layer} in another kernel format; delete it")
            return
        start, digests = self._end, []
        try:
            for checksum in write_layer(self._file.fileno(), start, tensors, self._record_of(layout), self._direct):
                digests.append(checksum)
                self._end += layout.nbytes
        except OSError as error:
            raise self._failed(error) from None
        self._layers[layer] = (layout, start, digests)
        try:
            self._journal.add(layer, self._layers[layer])
        except OSError as error:
            raise self._failed(error) from None

    def _record_of(self, layout: RecordLayout) -> torch.Tensor:
        # Reused from layer to layer: malloc kept up to eight records when each layer allocated one. The
        # padding between pieces is never written, so it stays zero.
        if self._record is None or self._record[0] != layout:
            self._record = (layout, aligned_empty(layout.nbytes).zero_())
        return self._record[1]

    def seal(self) -> FileStore:
        if self._finished is not None:
            return self._finished
        try:
            self._index.sources = self._sources.sources()
        except StoreError:
            self.abort()  # some packed layers may be from the old files, others from the new ones
            raise
        if self._layers.keys() != set(range(len(self._layers))):
            self.abort()
            raise StoreError(f"{self._partial} had layers that the model does not have; start again")
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
            self._journal.remove()
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None
        self._file.close()  # releases the lock: a waiting writer now finds the finished pack
        return store

    def abort(self) -> None:
        self._sources.stop_hashing()
        self._give_up()

    def _give_up(self) -> None:
        if not self._file.closed:  # else sealed or aborted: a partial file is then another writer's
            self._journal.remove()
            self._partial.unlink(missing_ok=True)
            self._file.close()

    def _failed(self, error: OSError) -> StoreError:
        """Aborts, and returns the exception to raise."""
        free = shutil.disk_usage(self.path.parent).free
        self.abort()
        remedy = "check the disk"
        if error.errno in NO_SPACE:
            remedy = f"{self._end} of {self._expected_bytes} bytes are written, {free} are free; free some space"
        return StoreError(f"{self.path} cannot be written ({error.strerror}); {remedy}")


def _open_locked(partial: Path) -> tuple[FileIO, bool, bool]:
    """Opens and locks a partial file; returns it, whether it has direct I/O, and whether the lock had to be waited for.

    The lock is on the file itself and ends with its process. A process id would mean nothing in another container, and
    a lock file would have to be removed.
    """
    waited = False
    while True:
        fd, direct = open_direct(partial, os.O_RDWR | os.O_CREAT)
        file = FileIO(fd, "r+")
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
        file.close()  # the other writer has sealed or aborted: this file is no longer the partial file


def write_layer(
    fd: int, offset: int, tensors: Mapping[str, torch.Tensor], record: torch.Tensor, direct: bool
) -> Iterator[bytes]:
    """Writes the records of a layer from `offset` on; yields the checksum of each once it is written.

    Args:
        fd: file descriptor.
        offset: aligned offset in bytes.
        tensors: one tensor `[experts, ...]` per piece.
        record: aligned memory for one record, zero between the pieces.
        direct: the file is open for direct I/O; else its pages are dropped from the page cache.

    Raises:
        OSError: the file cannot be written.
    """
    experts = next(iter(tensors.values())).shape[0]
    pieces = [
        (piece, tensors[piece.name].reshape(experts, -1).view(torch.uint8).view(experts, piece.nbytes))
        for piece in RecordLayout.of(tensors).pieces
    ]
    for expert in range(experts):
        for piece, source in pieces:
            record[piece.offset : piece.offset + piece.nbytes] = source[expert]
        write_full(fd, record, offset + expert * len(record))
        yield digest(record.numpy().data)
    if not direct:
        os.fdatasync(fd)
        drop_cached(fd)


def _block(data: bytes) -> torch.Tensor:
    """Copies `data` to aligned memory, padded with zeros to whole blocks."""
    block = aligned_empty(align(len(data))).zero_()
    block[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return block


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
