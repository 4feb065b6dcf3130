"""Experts whose values are known, and a store of few page-locked records for many experts."""

from collections.abc import Iterator, Sequence

import torch

from vllm_adapmoe.bench.gpu_check.device import Device
from vllm_adapmoe.bench.gpu_check.shapes import DOWN, GATE_UP, Shape
from vllm_adapmoe.cache.eviction import ExpertKey
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, aligned_empty

BLOCK_BYTES = (4 << 30) - ALIGNMENT
"""Of page-locked memory at a time; torch rounds it up to a power of two."""


def expert(shape: Shape, dtype: torch.dtype, device: Device, seed: int, key: ExpertKey) -> dict[str, torch.Tensor]:
    """The weights of an expert, on the device; the same each time."""
    generator = torch.Generator(device.torch).manual_seed(seed + key[0] * shape.experts + key[1])
    return {
        piece.name: (torch.randn(piece.shape, generator=generator, device=device.torch) / piece.shape[-1] ** 0.5).to(
            dtype
        )
        for piece in shape.layout(dtype).pieces
    }


def pieces_of(layout: RecordLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
    """The pieces of a record, uint8 `[record bytes]`: views."""
    return {
        piece.name: record[piece.offset : piece.offset + piece.nbytes].view(piece.dtype).view(piece.shape)
        for piece in layout.pieces
    }


def addresses(places: Sequence[dict[str, torch.Tensor]], device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Table of the kernel, two times int64 `[experts]` on the device: where each expert's pieces are."""
    gate_up, down = ([place[name].data_ptr() for place in places] for name in (GATE_UP, DOWN))
    return torch.tensor(gate_up, device=device.torch), torch.tensor(down, device=device.torch)


class PinnedRecords:
    """An `ExpertStore` of `records` page-locked records; where there are fewer than experts, experts share them.

    A model bigger than the host's memory can be copied from it: the bytes that move are real, their values repeat.
    """

    def __init__(self, layout: RecordLayout, layers: int, experts: int, records: int, pin: bool) -> None:
        self.layouts = [layout] * layers
        self.experts = experts
        self.records: list[torch.Tensor] = []
        self.blocks: list[torch.Tensor] = []
        """Page-locked memory as it was allocated, several records each."""
        block = max(1, BLOCK_BYTES // layout.nbytes)
        for start in range(0, records, block):
            count = min(block, records - start)
            self.blocks.append(aligned_empty(count * layout.nbytes, pin=pin))
            self.records += self.blocks[-1].view(count, layout.nbytes).unbind()

    def put(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Fills a record."""
        for name, piece in pieces_of(self.layouts[0], self.records[index]).items():
            piece.copy_(weights[name])

    def page_locked(self, key: ExpertKey) -> torch.Tensor:
        """The record of an expert, uint8 `[record bytes]`."""
        return self.records[(key[0] * self.experts + key[1]) % len(self.records)]

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return self.experts

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[0].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        layout, record = self.layouts[key[0]], self.page_locked(key)
        for piece, destination in zip(layout.pieces, layout.destinations(into), strict=True):
            for start in range(0, piece.nbytes, tile_bytes):
                stop = min(start + tile_bytes, piece.nbytes)
                destination[start:stop].copy_(record[piece.offset + start : piece.offset + stop])
                yield stop - start

    def close(self) -> None:
        self.records.clear()
        self.blocks.clear()
