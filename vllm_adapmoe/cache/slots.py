"""The memory of a pool: one tensor `[slots, ...]` for each piece of an expert."""

import torch

from vllm_adapmoe.store.record import RecordLayout, aligned_empty


class SlotPool:
    """`num_slots` places for experts of one layout, on the host.

    Kernels index experts of `tensors[name]`, shape `[num_slots, *piece.shape]`, as if they were those of one layer.
    Memory is committed when a slot is first filled.
    """

    def __init__(self, layout: RecordLayout, num_slots: int) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.tensors: dict[str, torch.Tensor] = {}
        bytes_of_slot: list[list[torch.Tensor]] = [[] for _ in range(num_slots)]
        for piece in layout.pieces:
            size = piece.nbytes
            memory = aligned_empty(num_slots * size)
            self.tensors[piece.name] = memory.view(piece.dtype).view(num_slots, *piece.shape)
            for slot in range(num_slots):
                bytes_of_slot[slot].append(memory[slot * size : (slot + 1) * size])
        self._bytes_of_slot = bytes_of_slot

    def destination(self, slot: int) -> list[torch.Tensor]:
        """The bytes of one slot, uint8, one flat tensor a piece in layout order: where a record is read into."""
        return self._bytes_of_slot[slot]
