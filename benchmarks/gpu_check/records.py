"""Experts with known values, and a store with few page-locked records for many experts."""

from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.device.residency import Loads
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.page_lock import page_lock_refusal, page_unlock
from vllm_adapmoe.store.record import RecordLayout, aligned_empty


def expert(shape: Shape, dtype: torch.dtype, device: Device, seed: int, key: ExpertKey) -> dict[str, torch.Tensor]:
    """Makes the weights of an expert on the device; the same each time."""
    generator = torch.Generator(device.torch).manual_seed(seed + key[0] * shape.experts + key[1])
    return {
        piece.name: (torch.randn(piece.shape, generator=generator, device=device.torch) / piece.shape[-1] ** 0.5).to(
            dtype
        )
        for piece in shape.layout(dtype).pieces
    }


def pieces_of(layout: RecordLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the pieces of a record, uint8 `[record bytes]`, as views."""
    return {
        piece.name: record[piece.offset : piece.offset + piece.nbytes].view(piece.dtype).view(piece.shape)
        for piece in layout.pieces
    }


def map_of(slots: Sequence[int], device: Device) -> torch.Tensor:
    """Makes a kernel's map from expert to slot, int32 `[experts + 1]` on the device; the last is of dropped pairs."""
    return torch.tensor([*slots, -1], dtype=torch.int32, device=device.torch)


def demand(store: ExpertStore, copies: Sequence[tuple[ExpertKey, int]], device: Device) -> Loads:
    """Makes a list of demand loads as `claim` writes it, of these experts and their slots."""
    loads = Loads(len(copies), device.torch)
    rows = []
    for key, slot in copies:
        record = store.page_locked(key)
        assert record is not None
        rows.append([record.data_ptr(), slot])
    loads.entries[0] = torch.tensor(rows, dtype=torch.int64)
    loads.counts[0] = len(copies)
    return loads


class PinnedRecords:
    """An `ExpertStore` of `records` page-locked records; if there are fewer than experts, experts share them.

    It can represent a model larger than host memory: as many bytes are moved, but values repeat.

    Raises:
        MemoryError: the memory cannot be page-locked.
    """

    def __init__(self, layout: RecordLayout, layers: int, experts: int, records: int, device: Device) -> None:
        self.layouts = [layout] * layers
        self.experts = experts
        self.memory = aligned_empty(records * layout.nbytes)
        """Memory of all records, one after another."""
        self.records = self.memory.view(records, layout.nbytes)
        self._locked = device.cuda
        if device.cuda and (refusal := page_lock_refusal(self.memory)) is not None:
            self._locked = False
            raise MemoryError(f"{len(self.memory)} bytes of host memory cannot be page-locked: {refusal}")

    def put(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Fills a record."""
        for name, piece in pieces_of(self.layouts[0], self.records[index]).items():
            piece.copy_(weights[name])

    def page_locked(self, key: ExpertKey) -> torch.Tensor:
        """Returns the record of an expert, uint8 `[record bytes]`."""
        return self.records[(key[0] * self.experts + key[1]) % len(self.records)]

    def hold(self, key: ExpertKey) -> torch.Tensor:
        return self.page_locked(key)

    def release(self, key: ExpertKey) -> None:
        pass

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return self.experts

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[0].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        return self.layouts[key[0]].read_tiles(self.page_locked(key), into, tile_bytes)

    def close(self) -> None:
        if self._locked:
            page_unlock(self.memory)
            self._locked = False
