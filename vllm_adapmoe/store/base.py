"""Interfaces of the backing stores: reading (`ExpertStore`) and writing (`StoreWriter`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.store.record import RecordLayout


class StoreError(OneLineError, RuntimeError):
    """An error of reading or writing records; the message is one line: the file, what is wrong, the remedy."""


class ExpertsUnavailable(StoreError):
    """Experts of one layer that could not be read; they were not put into slots."""

    def __init__(self, message: str, experts: Sequence[int]) -> None:
        super().__init__(message)
        self.experts = list(experts)


class ExpertStore(Protocol):
    """A backing store: read-only copies of all experts of a worker, read by several threads at once."""

    @property
    def layouts(self) -> Sequence[RecordLayout]:
        """Record layout of each MoE layer."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        ...

    def num_experts(self, layer: int) -> int:
        """Returns the number of experts of a layer."""
        ...

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        """Reads a record into `into`, one contiguous tensor of any dtype per piece in layout order; thread-safe.

        Raises:
            StoreError: the record cannot be read completely, or is not what was written.
            ValueError: `into` does not have the sizes of the pieces.
        """
        ...

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        """Reads a record like `read`, in tiles of at most `tile_bytes`, a multiple of 4096; yields the bytes of each.

        The record is complete and verified when the iterator has ended. The iterator may be closed earlier, and moved
        between threads.
        """
        ...

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        """Returns the record if it always is in memory that the slots' device can read, uint8 `[record bytes]`."""
        ...

    def hold(self, key: ExpertKey) -> torch.Tensor | None:
        """Like `page_locked`, but for a record that is there now, and stays until `release`; None: nothing to release.

        Called once for each fetch; thread-safe.
        """
        ...

    def release(self, key: ExpertKey) -> None:
        """Ends a `hold`: no copy reads the record any more; thread-safe."""
        ...

    def close(self) -> None:
        """Releases files and memory."""
        ...


class StoreWriter(Protocol):
    """Writes a store layer by layer, in any order."""

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes all experts of a layer: one contiguous tensor `[experts, ...]` per parameter, reusable afterwards.

        Raises:
            StoreError: no space.
        """
        ...

    def seal(self) -> ExpertStore:
        """Ends writing and returns the store; every layer from 0 on must have been put."""
        ...

    def abort(self) -> None:
        """Abandons writing and removes what was written."""
        ...
