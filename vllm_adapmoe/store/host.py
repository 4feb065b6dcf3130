"""Experts in host memory, page-locked beside a CUDA device."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from vllm_adapmoe.cache.eviction import ExpertKey
from vllm_adapmoe.store.record import RecordLayout, aligned_empty


class HostStore:
    """One buffer `[experts, record bytes]` a layer. Its own writer."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[RecordLayout, torch.Tensor]] = {}
        self.layouts: list[RecordLayout] = []

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        layout = RecordLayout.of(tensors)
        experts = next(iter(tensors.values())).shape[0]
        records = aligned_empty(experts * layout.nbytes, pin=torch.cuda.is_available()).view(experts, layout.nbytes)
        for piece in layout.pieces:
            source = tensors[piece.name].reshape(experts, -1).view(torch.uint8).view(experts, piece.nbytes)
            records[:, piece.offset : piece.offset + piece.nbytes] = source
        self._layers[layer] = (layout, records)

    def seal(self) -> "HostStore":
        self.layouts = [self._layers[layer][0] for layer in range(len(self._layers))]
        return self

    def abort(self) -> None:
        self.close()

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        return self._layers[layer][1].shape[0]

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[key[0]].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        layout, records = self._layers[key[0]]
        record = records[key[1]]
        for piece, destination in zip(layout.pieces, layout.destinations(into), strict=True):
            for start in range(0, piece.nbytes, tile_bytes):
                stop = min(start + tile_bytes, piece.nbytes)
                destination[start:stop].copy_(record[piece.offset + start : piece.offset + stop])
                yield stop - start

    def close(self) -> None:
        self._layers.clear()
