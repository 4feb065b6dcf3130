"""SlotMaps: the slot of every expert, as kernels' maps read it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vllm_adapmoe.policy.residency import Residency


class SlotMaps:
    """Slot of each resident expert, -1 for others: one int32 host tensor `[num_experts]` per layer.

    The tensors share memory with the pools' residency, which other threads change under the lock of the transfers. A
    pinned expert that has arrived keeps its slot.

    Args:
        pools: residency of each pool.
        pool_of: pool of each layer.
        num_experts: number of experts of each layer.
    """

    def __init__(self, pools: Sequence[Residency], pool_of: Sequence[int], num_experts: Sequence[int]) -> None:
        self.arrays = [
            pools[pool].slots[layer, :count]
            for layer, (pool, count) in enumerate(zip(pool_of, num_experts, strict=True))
        ]
        """The maps as numpy arrays."""
        self._tensors = [torch.from_numpy(slots) for slots in self.arrays]

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._tensors[layer]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tensors)

    def copy(self) -> np.ndarray:
        """Returns all maps as one array, int32 `[layers, experts]`; -1 beyond the experts of a smaller layer."""
        slots = np.full((len(self.arrays), max(map(len, self.arrays))), -1, dtype=np.int32)
        for row, layer in zip(slots, self.arrays, strict=True):
            row[: len(layer)] = layer
        return slots
