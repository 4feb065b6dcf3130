"""What every store offers, and how one is filled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.store.record import RecordLayout


class StoreError(OneLineError, RuntimeError):
    """Records that cannot be written or read; the message is one line: the file, what is wrong, the remedy."""


class ExpertsUnavailable(StoreError):
    """Experts of one layer could not be read, and nothing was put into their slots."""

    def __init__(self, message: str, experts: Sequence[int]) -> None:
        super().__init__(message)
        self.experts = list(experts)


class ExpertStore(Protocol):
    """Backing copies of all experts of a worker; read-only, and read by several threads at once."""

    @property
    def layouts(self) -> Sequence[RecordLayout]:
        """Of each MoE layer."""
        ...

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        ...

    def num_experts(self, layer: int) -> int:
        """Experts of a layer."""
        ...

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        """Fills `into`, one contiguous tensor of any dtype per piece in layout order. Blocks; thread-safe.

        Raises:
            StoreError: the record cannot be read whole, or is not what was written.
            ValueError: `into` does not have the sizes of the pieces.
        """
        ...

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        """The same in tiles of at most `tile_bytes`, a multiple of 4096; yields the bytes of each.

        The record is whole and checked when the iterator has ended. It may be closed before, and moved between threads.
        """
        ...

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        """A record where the device of the slots can read it itself, uint8 `[record bytes]`; None: it cannot."""
        ...

    def close(self) -> None:
        """Lets go of files and memory."""
        ...


class StoreWriter(Protocol):
    """Fills a store layer by layer, in any order."""

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes all experts of a layer: one contiguous tensor `[experts, ...]` per parameter, free to be reused after.

        Raises:
            StoreError: no space.
        """
        ...

    def seal(self) -> ExpertStore:
        """Ends writing; every layer from 0 on must have been put."""
        ...

    def abort(self) -> None:
        """Gives up and leaves nothing behind."""
        ...
