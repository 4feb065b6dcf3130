"""Experts in a packed file, read with direct I/O."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from blake3 import blake3

from vllm_adapmoe.cache.eviction import ExpertKey
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import drop_cached, is_aligned, open_direct, read_full
from vllm_adapmoe.store.pack_index import PackIndex, decode_head, digest
from vllm_adapmoe.store.record import ALIGNMENT, aligned_empty, as_bytes


class PackMissing(StoreError):
    """There is no pack of that name."""


class PackInvalid(StoreError):
    """A pack that is truncated, damaged, or half-written: to be made anew."""


class PackOfAnother(StoreError):
    """A sound pack, but of another model or vLLM version."""


def read_index(path: Path) -> PackIndex:
    """The index of the pack at `path`, checked; no record is read.

    Raises:
        PackMissing: no such file.
        PackInvalid: not a whole pack.
    """
    try:
        with path.open("rb") as file:
            offset, size, checksum = decode_head(file.read(ALIGNMENT), path.stat().st_size)
            file.seek(offset)
            data = file.read(size)
        if blake3(data).digest() != checksum:
            raise ValueError("has a damaged index")
        return PackIndex.decode(data)
    except FileNotFoundError:
        raise PackMissing(f"{path} does not exist") from None
    except (ValueError, KeyError, OSError) as error:
        raise PackInvalid(f"{path} {error}") from None


def open_pack(path: Path, identity: dict[str, str]) -> "FileStore":
    """Opens the pack at `path` if it was made from `identity`.

    Raises:
        PackMissing: no such file.
        PackInvalid: not a whole pack.
        PackOfAnother: its identity differs; the message names the first difference.
    """
    index = read_index(path)
    for key, value in identity.items():
        found = index.identity.get(key)
        if found != value:
            raise PackOfAnother(
                f"{path} holds the experts of another {key} ({found}, here {value}); delete it or set another store_dir"
            )
    return FileStore(path, index)


class FileStore:
    """An open pack. Checks each record's checksum the first time it is read."""

    def __init__(self, path: Path, index: PackIndex) -> None:
        self.path = path
        self.layouts = index.layouts
        self._index = index
        self._fd, self._direct = open_direct(path, os.O_RDONLY)
        self._unchecked = {
            (layer, expert) for layer, digests in enumerate(index.digests) for expert in range(len(digests))
        }
        self._bounce = threading.local()

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return len(self._index.digests[layer])

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        layer, expert = key
        layout = self.layouts[layer]
        offset = self._index.offsets[layer] + expert * layout.nbytes
        in_place = is_aligned(into)
        if in_place:
            buffers = list(into)
        else:  # direct I/O needs whole blocks: read the record aside and copy its pieces
            buffers = [self._bounce_buffer(layout.nbytes)]
        self._read_record(key, buffers, offset, layout.nbytes)
        if not in_place:
            for piece, destination in zip(layout.pieces, into, strict=True):
                as_bytes(destination).copy_(buffers[0][piece.offset : piece.offset + piece.nbytes])
        if key in self._unchecked:
            self._check(key, buffers)

    def _read_record(self, key: ExpertKey, buffers: list[torch.Tensor], offset: int, nbytes: int) -> None:
        reason = ""
        for _ in range(2):  # a failed read is tried once more
            try:
                count = read_full(self._fd, buffers, offset)
            except OSError as error:
                reason = str(error.strerror)
                continue
            if not self._direct:
                drop_cached(self._fd)
            if count == nbytes:
                return
            reason = f"{count} of {nbytes} bytes"
        raise StoreError(f"{self.path}: cannot read expert {key[1]} of MoE layer {key[0]} ({reason}); check the disk")

    def _check(self, key: ExpertKey, buffers: list[torch.Tensor]) -> None:
        found = blake3(max_threads=1)
        for buffer in buffers:
            found.update(buffer.numpy().data)
        if found.digest(len(digest(b""))) == self._index.digests[key[0]][key[1]]:
            self._unchecked.discard(key)
            return
        aside = self.path.with_name(self.path.name + ".corrupt")
        self.path.rename(aside)
        raise StoreError(
            f"{self.path}: expert {key[1]} of MoE layer {key[0]} is damaged; the pack was moved to {aside.name}, "
            "start again to pack anew"
        )

    def _bounce_buffer(self, nbytes: int) -> torch.Tensor:
        buffer = getattr(self._bounce, "buffer", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._bounce.buffer = aligned_empty(nbytes)
        return buffer[:nbytes]

    def close(self) -> None:
        os.close(self._fd)
