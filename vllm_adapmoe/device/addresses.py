"""AddressTable: the device address of each expert, in its slot or in host memory."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.device import ALIGNMENT
from vllm_adapmoe.store.base import ExpertStore


class AddressTable:
    """Holds, on the device, the addresses of some pieces of every expert.

    Args:
        store: page-locked backing store.
        pools: pools of slots.
        pool_of: pool of each MoE layer.
        pieces: names of the pieces.
        device: device of the slots.

    Raises:
        ValueError: the store has a record that the device cannot read, or an expert does not begin at a multiple of
            `ALIGNMENT`.
    """

    def __init__(
        self,
        store: ExpertStore,
        pools: Sequence[SlotPool],
        pool_of: Sequence[int],
        pieces: Sequence[str],
        device: torch.device,
    ) -> None:
        experts = max(store.num_experts(layer) for layer in range(store.num_layers))
        self._host_addresses = np.zeros((len(pieces), store.num_layers, experts), dtype=np.int64)
        """Addresses of the backing copies, `[pieces, layers, experts]`."""
        self._bases = np.zeros((len(pieces), store.num_layers), dtype=np.int64)
        self._strides = np.zeros_like(self._bases)
        for layer, pool in enumerate(pool_of):
            offsets = {piece.name: piece.offset for piece in store.layouts[layer].pieces}
            for index, name in enumerate(pieces):
                tensor = pools[pool].tensors[name]
                self._bases[index, layer] = tensor.data_ptr()
                self._strides[index, layer] = tensor.stride(0) * tensor.element_size()
            for expert in range(store.num_experts(layer)):
                record = store.page_locked((layer, expert))
                if record is None:
                    raise ValueError(f"expert {expert} of MoE layer {layer} is not in page-locked memory")
                for index, name in enumerate(pieces):
                    self._host_addresses[index, layer, expert] = record.data_ptr() + offsets[name]
        for values in (self._host_addresses, self._bases, self._strides):
            if (values % ALIGNMENT).any():
                raise ValueError(f"an expert's {' or '.join(pieces)} does not begin at a multiple of {ALIGNMENT} bytes")
        self._published: np.ndarray | None = None
        self.table = torch.from_numpy(self._host_addresses).to(device, copy=True)
        """Addresses for the kernels, int64 `[pieces, layers, experts]`."""

    def publish(self, slots: np.ndarray) -> None:
        """Updates the table, so that kernels launched from here on read experts in these slots.

        Args:
            slots: int32 `[layers, experts]`, -1 for an expert to read from its backing copy.
        """
        if self._published is not None and np.array_equal(slots, self._published):
            return
        addresses = self._bases[..., None] + self._strides[..., None] * slots
        table = torch.from_numpy(np.where(slots >= 0, addresses, self._host_addresses))
        if self.table.is_cuda:
            table = table.pin_memory()  # or the copy would wait for the work on the stream
        self.table.copy_(table, non_blocking=True)
        self._published = slots.copy()  # only now: set once the copy has been issued
