"""StoreShard: the store of a rank that holds only some experts of every layer, addressed by global expert ids."""

from collections.abc import Iterator, Sequence

import torch

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.record import RecordLayout


class StoreShard:
    """Maps global expert ids, used by routers, heads and the scheduler, to the records of this rank's store.

    Args:
        store: store of this rank's records.
        records: for each layer, the record index of each expert of the model; -1 where another rank holds it.
    """

    def __init__(self, store: ExpertStore, records: Sequence[Sequence[int]]) -> None:
        self.store = store
        self.records = records

    @property
    def layouts(self) -> Sequence[RecordLayout]:
        return self.store.layouts

    @property
    def num_layers(self) -> int:
        return self.store.num_layers

    def num_experts(self, layer: int) -> int:
        return len(self.records[layer])

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        self.store.read(self._record(key), into)

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        return self.store.read_tiles(self._record(key), into, tile_bytes)

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        return self.store.page_locked(self._record(key))

    def hold(self, key: ExpertKey) -> torch.Tensor | None:
        return self.store.hold(self._record(key))

    def release(self, key: ExpertKey) -> None:
        self.store.release(self._record(key))

    def close(self) -> None:
        self.store.close()

    def _record(self, key: ExpertKey) -> ExpertKey:
        record = self.records[key[0]][key[1]]
        assert record >= 0, f"another rank holds expert {key[1]} of layer {key[0]}"
        return key[0], record
