"""SlotMaps: the slot of every expert, as the host and the kernels' maps read it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vllm_adapmoe.experts import ExpertKey


class SlotMaps:
    """Slot of each resident expert, -1 for others: one int32 host tensor `[num_experts]` per layer.

    Args:
        num_experts: number of experts of each layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._tensors = [torch.full((count,), -1, dtype=torch.int32) for count in num_experts]
        self._arrays = [tensor.numpy() for tensor in self._tensors]

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._tensors[layer]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tensors)

    def place(self, key: ExpertKey, slot: int) -> None:
        """Records that an expert is resident in `slot`."""
        self._arrays[key[0]][key[1]] = slot

    def evict(self, key: ExpertKey | None) -> None:
        """Records that an expert is not resident any more; does nothing for None, a load without a victim."""
        if key is not None:
            self._arrays[key[0]][key[1]] = -1

    def clear(self) -> None:
        """Records that no expert is resident."""
        for slots in self._arrays:
            slots.fill(-1)

    def copy(self) -> np.ndarray:
        """Returns all maps as one array, int32 `[layers, experts]`; -1 beyond the experts of a smaller layer."""
        slots = np.full((len(self._arrays), max(map(len, self._arrays))), -1, dtype=np.int32)
        for row, layer in zip(slots, self._arrays, strict=True):
            row[: len(layer)] = layer
        return slots
