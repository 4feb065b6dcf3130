"""HostStore: experts in host memory, page-locked for a CUDA device."""

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.store.page_lock import page_lock_refusal, page_unlock
from vllm_adapmoe.store.record import RecordLayout, aligned_empty
from vllm_adapmoe.units import GiB

logger = logging.getLogger(__name__)


class HostStore:
    """Backing store in host memory: one buffer `[experts, record bytes]` per layer; also its `StoreWriter`.

    Putting a layer again overwrites it in place: the device knows its addresses, and two copies may not fit.

    Args:
        device: device of the slots.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layers: dict[int, tuple[RecordLayout, torch.Tensor]] = {}
        self._refusals: dict[int, str] = {}
        """Reasons why layers are not page-locked, by layer, with a CUDA device."""
        self.layouts: list[RecordLayout] = []

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        layout = RecordLayout.of(tensors)
        experts = next(iter(tensors.values())).shape[0]
        known = self._layers.get(layer)
        if known is None:
            records = aligned_empty(experts * layout.nbytes).view(experts, layout.nbytes)
        else:
            records = known[1]
            assert known[0] == layout and len(records) == experts
        for piece in layout.pieces:
            source = tensors[piece.name].reshape(experts, -1).view(torch.uint8).view(experts, piece.nbytes)
            records[:, piece.offset : piece.offset + piece.nbytes] = source
        if known is not None:
            return
        self._layers[layer] = (layout, records)
        if self.device.type == "cuda" and (refusal := page_lock_refusal(records)) is not None:
            self._refusals[layer] = refusal

    def seal(self) -> "HostStore":
        if self._refusals:
            sizes = {layer: records.numel() / GiB for layer, (_, records) in self._layers.items()}
            refused = sum(sizes[layer] for layer in self._refusals)
            logger.warning(
                "%.2f GiB of experts are page-locked; %.2f GiB are not, and are copied through a buffer, which is "
                "slower: %s",
                sum(sizes.values()) - refused, refused, ", and ".join(sorted(set(self._refusals.values()))),
            )  # fmt: skip
        self.layouts = [self._layers[layer][0] for layer in range(len(self._layers))]
        return self

    def abort(self) -> None:
        self.close()

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return self._layers[layer][1].shape[0]

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        if key[0] in self._refusals:
            return None
        return self._layers[key[0]][1][key[1]]

    def hold(self, key: ExpertKey) -> torch.Tensor | None:
        return self.page_locked(key)

    def release(self, key: ExpertKey) -> None:
        pass

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[key[0]].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        layout, records = self._layers[key[0]]
        return layout.read_tiles(records[key[1]], into, tile_bytes)

    def close(self) -> None:
        for layer, (_, records) in self._layers.items():
            if self.device.type == "cuda" and layer not in self._refusals:
                page_unlock(records)
        self._layers.clear()
