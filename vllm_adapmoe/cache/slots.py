"""The memory of a pool: one tensor `[slots, ...]` for each piece of an expert."""

import threading
from collections.abc import Callable, Sequence

import torch

from vllm_adapmoe.store.record import RecordLayout, aligned_empty


class SlotPool:
    """`num_slots` places for experts of one layout.

    Kernels index experts of `tensors[name]`, shape `[num_slots, *piece.shape]`, as if they were those of one layer.
    On the CPU memory is committed when a slot is first filled.
    """

    def __init__(self, layout: RecordLayout, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        bytes_of_slot: list[list[torch.Tensor]] = [[] for _ in range(num_slots)]
        for piece in layout.pieces:
            size = piece.nbytes
            if device.type == "cpu":
                memory = aligned_empty(num_slots * size)
            else:
                memory = torch.empty(num_slots * size, dtype=torch.uint8, device=device)
            self.tensors[piece.name] = memory.view(piece.dtype).view(num_slots, *piece.shape)
            for slot in range(num_slots):
                bytes_of_slot[slot].append(memory[slot * size : (slot + 1) * size])
        self._bytes_of_slot = bytes_of_slot
        self._staging = threading.local()

    def fill(self, slot: int, read: Callable[[Sequence[torch.Tensor]], None]) -> None:
        """Puts a record into a slot. `read` fills host memory: uint8, flat, one tensor a piece in layout order.

        On the CPU that is the slot itself; for a device it is page-locked memory of this thread, copied from there.
        Blocks until the slot is filled.
        """
        slot_bytes = self._bytes_of_slot[slot]
        if self.device.type == "cpu":
            read(slot_bytes)
            return
        staging = self._staging_of_thread()
        read(staging)
        for destination, source in zip(slot_bytes, staging, strict=True):
            destination.copy_(source)

    def _staging_of_thread(self) -> list[torch.Tensor]:
        if not hasattr(self._staging, "pieces"):
            memory = aligned_empty(self.layout.nbytes, pin=True)
            self._staging.pieces = [memory[p.offset : p.offset + p.nbytes] for p in self.layout.pieces]
        return self._staging.pieces
