"""Layout of one expert's record: all its parameters, in the kernel's format, one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

ALIGNMENT = 4096
"""Alignment in bytes of records and their pieces, so that direct I/O can read them in place."""


def align(nbytes: int) -> int:
    """Returns `nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned_empty(nbytes: int, pin: bool = False) -> torch.Tensor:
    """Allocates uninitialised, aligned host memory, uint8 `[nbytes]`.

    Its pages are committed when first written. `pin` page-locks it, for copies to a GPU.
    """
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu", pin_memory=pin)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view of a contiguous tensor's memory, uint8 `[nbytes]`, never a copy.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return tensor.view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Piece:
    """One parameter of one expert, and its place in the record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Offset in bytes from the start of the record."""
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """Positions of the pieces of a record. Layers of equal layout can share a pool of slots."""

    pieces: tuple[Piece, ...]
    nbytes: int
    """Size of a record in bytes, a multiple of the alignment."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Returns the layout of experts given as one tensor `[experts, ...]` per parameter."""
        pieces = []
        offset = 0
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape[1:])
            nbytes = tensor[0].numel() * tensor.element_size()
            pieces.append(Piece(name, tensor.dtype, shape, offset, nbytes))
            offset += align(nbytes)
        return cls(tuple(pieces), offset)

    def destinations(self, into: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the tensors of `into`, the destinations of the pieces, as bytes.

        Raises:
            ValueError: not one contiguous tensor of the right size for each piece.
        """
        destinations = [as_bytes(tensor) for tensor in into]
        sizes = [destination.numel() for destination in destinations]
        if sizes != [piece.nbytes for piece in self.pieces]:
            raise ValueError(f"{sizes} bytes for pieces of {[piece.nbytes for piece in self.pieces]} bytes")
        return destinations

    def tiles(self, tile_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yields tiles of at most `tile_bytes` within one piece: index of the piece, start and end within it."""
        for number, piece in enumerate(self.pieces):
            for start in range(0, piece.nbytes, tile_bytes):
                yield number, start, min(start + tile_bytes, piece.nbytes)

    def read_tiles(self, record: torch.Tensor, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        """Copies a record, uint8 `[record bytes]`, within host memory, as `ExpertStore.read_tiles` does."""
        destinations = self.destinations(into)
        for number, start, stop in self.tiles(tile_bytes):
            offset = self.pieces[number].offset
            destinations[number][start:stop].copy_(record[offset + start : offset + stop])
            yield stop - start

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": piece.name, "dtype": str(piece.dtype).removeprefix("torch."), "shape": list(piece.shape)}
            for piece in self.pieces
        ]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> Self:
        """Returns the layout that `to_json` described.

        Raises:
            ValueError: unknown dtype.
        """
        tensors = {}
        for piece in value:
            dtype = getattr(torch, piece["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"unknown dtype {piece['dtype']!r}")
            tensors[piece["name"]] = torch.empty((1, *piece["shape"]), dtype=dtype, device="meta")
        return cls.of(tensors)
