"""FileStore: experts in a packed file, read with direct I/O."""

import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import torch
from blake3 import blake3

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import drop_cached, is_aligned, open_direct, read_full
from vllm_adapmoe.store.pack_check import read_index
from vllm_adapmoe.store.pack_index import PackIndex, decode_head, digest
from vllm_adapmoe.store.record import ALIGNMENT, align, aligned_empty
from vllm_adapmoe.store.source_files import SourceFiles


class PackMissing(StoreError):
    """A pack that does not exist."""


class PackInvalid(StoreError):
    """A pack that is truncated, damaged or half-written, and must be repacked."""


class PackOfAnother(StoreError):
    """A valid pack for another model or vLLM version."""


class PackOutdated(StoreError):
    """A valid pack whose source files have changed since; it must be repacked."""


def open_pack(path: Path, identity: dict[str, str]) -> "FileStore":
    """Opens the pack at `path` if it was made with the settings `identity`, which may be a subset of the pack's own.

    Source files are compared by `FileStore.check_sources`.

    Raises:
        PackMissing: no such file.
        PackInvalid: not a complete pack, as far as its size and index show; no record is read.
        PackOfAnother: its identity differs; the message names the first difference.
    """
    try:
        fd, direct = open_direct(path, os.O_RDONLY)
        file = FileIO(fd)  # closes the descriptor when garbage collected
        index = _read_index(fd)
    except FileNotFoundError:
        raise PackMissing(f"{path} does not exist; adapmoe pack, or a start with store=file, creates it") from None
    except OSError as error:
        raise PackInvalid(f"{path} cannot be read ({error.strerror}); remove it") from None
    except ValueError as error:
        raise PackInvalid(f"{path} {error}; remove it and start again to repack") from None
    for key, value in identity.items():
        packed = index.identity.get(key)
        if packed != value:
            raise PackOfAnother(
                f"{path} was packed for another {key} ({packed}, here {value}); delete it or set another store_dir"
            )
    return FileStore(path, file, direct, index)


def _read_index(fd: int) -> PackIndex:
    size = os.fstat(fd).st_size
    if size == 0 or size % ALIGNMENT:
        raise ValueError("is not a complete pack")
    block = aligned_empty(ALIGNMENT)
    read_full(fd, [block], 0)
    offset, length, checksum = decode_head(block.numpy().tobytes(), size)
    blocks = aligned_empty(align(length))
    read_full(fd, [blocks], offset)
    data = blocks[:length].numpy().tobytes()
    if blake3(data).digest() != checksum:
        raise ValueError("has a damaged index")
    return read_index(data, offset)


class FileStore:
    """Backing store in an open pack; verifies each record's checksum the first time it is read.

    Keeps reading the opened file even if another one takes its name.
    """

    def __init__(self, path: Path, file: FileIO, direct: bool, index: PackIndex) -> None:
        self.path = path
        self.layouts = index.layouts
        self._index = index
        self._file = file
        self._direct = direct
        self._unchecked = {
            (layer, expert) for layer, digests in enumerate(index.digests) for expert in range(len(digests))
        }
        self._aside: list[torch.Tensor] = []
        """Record buffers not in use by a read."""

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return len(self._index.digests[layer])

    def check_sources(self, sources: SourceFiles) -> None:
        """Compares the files that the pack was made from with a model's current files.

        Raises:
            PackOutdated: files of the same origin have changed.
            PackOfAnother: it was made from another model.
            StoreError: a file of the model cannot be read.
        """
        difference = sources.difference(self._index.sources)
        if difference is None:
            return
        if self._index.origin == sources.origin:
            raise PackOutdated(f"{self.path} is outdated: {sources.origin!r} has changed since: {difference}")
        raise PackOfAnother(
            f"{self.path} was packed from another model ({self._index.origin!r}: {difference}); delete it or "
            "set another store_dir"
        )

    def record_offset(self, key: ExpertKey) -> int:
        """Returns the offset of a record in the file."""
        return self._index.offsets[key[0]] + key[1] * self.layouts[key[0]].nbytes

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[key[0]].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        layout = self.layouts[key[0]]
        offset = self.record_offset(key)
        destinations = layout.destinations(into)
        if is_aligned(destinations):
            yield from self._read_record(key, destinations, offset, tile_bytes)
            return
        # Direct I/O needs whole blocks: read the record into a buffer and copy its pieces.
        try:
            aside = self._aside.pop()
        except IndexError:  # a check before would race: another thread may take the last one in between
            aside = aligned_empty(max(layout.nbytes for layout in self.layouts))
        try:
            yield from self._read_record(key, [aside[: layout.nbytes]], offset, tile_bytes)
            for piece, destination in zip(layout.pieces, destinations, strict=True):
                destination.copy_(aside[piece.offset : piece.offset + piece.nbytes])
        finally:
            self._aside.append(aside)

    def _read_record(
        self, key: ExpertKey, buffers: Sequence[torch.Tensor], offset: int, tile_bytes: int
    ) -> Iterator[int]:
        for tile in _tiles(buffers, tile_bytes):
            nbytes = sum(map(len, tile))
            self._read_tile(key, tile, nbytes, offset)
            offset += nbytes
            yield nbytes
        if key in self._unchecked:
            self._check(key, buffers)

    def _read_tile(self, key: ExpertKey, tile: Sequence[torch.Tensor], nbytes: int, offset: int) -> None:
        reason = ""
        fd = self._file.fileno()
        for _ in range(2):  # a failed read is tried once more
            try:
                count = read_full(fd, tile, offset)
            except OSError as error:
                reason = str(error.strerror)
                continue
            if not self._direct:
                drop_cached(fd, offset, nbytes)
            if count == nbytes:
                return
            reason = f"{count} of {nbytes} bytes"
        raise StoreError(f"{self.path}: cannot read expert {key[1]} of MoE layer {key[0]} ({reason}); check the disk")

    def _check(self, key: ExpertKey, buffers: Sequence[torch.Tensor]) -> None:
        hasher = blake3(max_threads=1)
        for buffer in buffers:
            hasher.update(buffer.numpy().data)
        if hasher.digest(len(digest(b""))) == self._index.digests[key[0]][key[1]]:
            self._unchecked.discard(key)
            return
        raise StoreError(f"{self.path}: expert {key[1]} of MoE layer {key[0]} is damaged; {self._set_aside()}")

    def _set_aside(self) -> str:
        """Renames the damaged pack so that the next start does not use it; returns what the user has to do."""
        aside = self.path.with_name(self.path.name + ".corrupt")
        try:
            if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                self.path.rename(aside)
                return f"the pack was renamed to {aside.name}; start again to repack"
        except FileNotFoundError:
            pass  # another reader has renamed the pack
        except OSError as error:
            return f"delete the pack (renaming it failed: {error.strerror}) and start again to repack"
        return "another process has renamed or replaced the pack; start again"

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        return None

    def hold(self, key: ExpertKey) -> torch.Tensor | None:
        return None

    def release(self, key: ExpertKey) -> None:
        pass

    def close(self) -> None:
        self._file.close()


def _tiles(buffers: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Yields the tiles of buffers that are consecutive in the file; a tile is one read, which may span buffers."""
    tile: list[torch.Tensor] = []
    room = tile_bytes
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            part = buffer[start : start + room]
            tile.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                yield tile
                tile, room = [], tile_bytes
    if tile:
        yield tile
