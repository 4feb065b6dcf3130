"""TieredStore: a packed file whose most often fetched records are kept in host memory, page-locked for a GPU."""

import logging
import threading
from collections.abc import Iterator, Sequence

import torch

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.page_lock import page_lock_refusal, page_unlock
from vllm_adapmoe.store.record import RecordLayout, aligned_empty
from vllm_adapmoe.units import GiB

logger = logging.getLogger(__name__)


class Cells:
    """Host memory for records of one size, and which of them it holds.

    Args:
        num_cells: number of records that fit.
        record_bytes: bytes of a record.
        layers: number of MoE layers.
        experts: experts of the largest layer.
        device: device of the slots.
    """

    def __init__(self, num_cells: int, record_bytes: int, layers: int, experts: int, device: torch.device) -> None:
        self.tier = HostTier(num_cells, layers, experts)
        self.records = aligned_empty(num_cells * record_bytes).view(num_cells, record_bytes)
        self.refusal = page_lock_refusal(self.records) if device.type == "cuda" and num_cells else None
        """Reason why the memory is not page-locked; None: it is."""
        self.page_locked = device.type == "cuda" and num_cells > 0 and self.refusal is None

    def close(self) -> None:
        if self.page_locked:
            page_unlock(self.records)


class TieredStore:
    """An `ExpertStore` that reads from a bounded part of host memory what it holds, and from another store the rest.

    Its memory fills with what is fetched (`HostTier`). Thread-safe.

    Args:
        store: the packed file.
        nbytes: bytes of host memory for records; layers of different sizes share it in proportion.
        device: device of the slots.
    """

    def __init__(self, store: ExpertStore, nbytes: int, device: torch.device) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        sizes: dict[int, int] = {}
        """Experts of each record size."""
        for layer, layout in enumerate(store.layouts):
            sizes[layout.nbytes] = sizes.get(layout.nbytes, 0) + store.num_experts(layer)
        total = sum(size * count for size, count in sizes.items())
        share = min(1.0, nbytes / total)
        experts = max(map(store.num_experts, range(store.num_layers)))
        self._cells = {
            size: Cells(int(count * share + 1e-9), size, store.num_layers, experts, device)
            for size, count in sizes.items()
        }
        self._warn()

    def _warn(self) -> None:
        refusals = {cells.refusal for cells in self._cells.values() if cells.refusal is not None}
        if refusals:
            logger.warning(
                "%.2f GiB of host_gb are not page-locked, and are copied through a buffer, which is slower: %s",
                sum(cells.records.numel() for cells in self._cells.values() if cells.refusal is not None) / GiB,
                ", and ".join(sorted(refusals)),
            )

    @property
    def layouts(self) -> Sequence[RecordLayout]:
        return self.store.layouts

    @property
    def num_layers(self) -> int:
        return self.store.num_layers

    @property
    def num_cells(self) -> int:
        """Number of records that fit."""
        return sum(len(cells.records) for cells in self._cells.values())

    def num_experts(self, layer: int) -> int:
        return self.store.num_experts(layer)

    def _cells_of(self, key: ExpertKey) -> Cells:
        return self._cells[self.layouts[key[0]].nbytes]

    def hold(self, key: ExpertKey) -> torch.Tensor | None:
        cells = self._cells_of(key)
        return self._find(cells, key) if cells.page_locked else None

    def release(self, key: ExpertKey) -> None:
        with self._lock:
            self._cells_of(key).tier.release(key)

    def page_locked(self, key: ExpertKey) -> torch.Tensor | None:
        return None

    def _find(self, cells: Cells, key: ExpertKey) -> torch.Tensor | None:
        """Returns the record if it is in host memory, and holds it there."""
        with self._lock:
            cell = cells.tier.hold(key)
            self._hits += cell is not None
        return None if cell is None else cells.records[cell]

    def read(self, key: ExpertKey, into: Sequence[torch.Tensor]) -> None:
        for _ in self.read_tiles(key, into, self.layouts[key[0]].nbytes):
            pass

    def read_tiles(self, key: ExpertKey, into: Sequence[torch.Tensor], tile_bytes: int) -> Iterator[int]:
        cells = self._cells_of(key)
        record = self._find(cells, key)
        if record is not None:
            try:
                yield from self.layouts[key[0]].read_tiles(record, into, tile_bytes)
            finally:
                self.release(key)
            return
        yield from self.store.read_tiles(key, into, tile_bytes)
        self._keep(cells, key, into)

    def _keep(self, cells: Cells, key: ExpertKey, pieces: Sequence[torch.Tensor]) -> None:
        """Copies a record that was read from the file, and verified, to host memory, if it is worth a cell."""
        with self._lock:
            self._misses += 1
            cell = cells.tier.admit(key)
        if cell is None:
            return
        layout, record = self.layouts[key[0]], cells.records[cell]
        try:
            for piece, source in zip(layout.pieces, layout.destinations(pieces), strict=True):
                record[piece.offset : piece.offset + piece.nbytes].copy_(source)
        except BaseException:
            with self._lock:
                cells.tier.discard(cell)
            raise
        with self._lock:
            cells.tier.commit(key, cell)

    def take_counts(self) -> tuple[int, int]:
        """Returns how many fetches found their record in host memory, and how many did not, since the last call."""
        with self._lock:
            counts, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counts

    def renew(self, store: ExpertStore) -> None:
        """Switches to a store of the same layouts and forgets all records; no read may run. Closes the previous one."""
        if store is not self.store:
            self.store.close()
            self.store = store
        for cells in self._cells.values():
            cells.tier = HostTier(len(cells.records), *cells.tier.counts.shape)

    def close(self) -> None:
        self.store.close()
        for cells in self._cells.values():
            cells.close()
