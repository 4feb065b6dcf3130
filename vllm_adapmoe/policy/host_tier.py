"""HostTier: chooses the experts that a bounded part of host memory keeps, between the slots and the packed file."""

import numpy as np

from vllm_adapmoe.experts import ExpertKey


class HostTier:
    """Keeps the records that are fetched most often: a record replaces one that was fetched less often, or none.

    It sees fetches alone. An expert that stays in a slot is not fetched, so its record makes way for others; what has
    just been fetched may be in both. Recency would be no guide: a prompt fetches all experts of a layer in order,
    after which an LRU tier smaller than the model holds none of those that the next prompt fetches.

    A cell in use is not evicted: one that is being written, or that a copy reads.

    Args:
        num_cells: number of records that fit.
        layers: number of MoE layers.
        experts: experts of the largest layer.
    """

    HALVING: float = 32
    """Fetches per cell after which all counts are halved, so that a tier follows its traffic. In replays
    (`examples/host_tier.py`) 8 forgets too fast for steps that use most experts."""

    def __init__(self, num_cells: int, layers: int, experts: int) -> None:
        self.counts = np.zeros((layers, experts))
        """Fetches of each expert, halved now and then, float64 `[layers, experts]`."""
        self._cell_of: dict[ExpertKey, int] = {}
        self._key_of: list[ExpertKey | None] = [None] * num_cells
        self._users = np.zeros(num_cells, dtype=np.int64)
        """Number of reads and writes of each cell in progress."""
        self._values = np.zeros(num_cells)
        """Count of the expert in each cell, as `counts` has it."""
        self._free = list(range(num_cells))
        self._until_halving = self.HALVING * num_cells

    def __len__(self) -> int:
        """Returns the number of records in cells."""
        return len(self._cell_of)

    def hold(self, key: ExpertKey) -> int | None:
        """Counts a fetch and returns the cell of its record, in use until `release`; None: the record is not here."""
        cell = self._cell_of.get(key)
        if cell is not None:
            self._count(key)
            self._users[cell] += 1
        return cell

    def release(self, key: ExpertKey) -> None:
        """Ends one use of a record's cell."""
        self._users[self._cell_of[key]] -= 1

    def admit(self, key: ExpertKey) -> int | None:
        """Counts a fetch from the file, and returns the cell to write its record to; None: it is not to be kept.

        The record that was in the cell is forgotten. Call `commit` or `discard` next, for this key.
        """
        self._count(key)
        if key in self._cell_of:
            return None
        if self._free:
            cell = self._free.pop()
        else:
            # Cells in use are out of the question; a tier of no cell has no minimum.
            values = np.where(self._users == 0, self._values, np.inf)
            cell = int(values.argmin()) if len(values) else -1
            if cell < 0 or values[cell] >= self.counts[key]:
                return None
            victim = self._key_of[cell]
            assert victim is not None
            del self._cell_of[victim]
            self._key_of[cell] = None
        self._users[cell] = 1
        return cell

    def commit(self, key: ExpertKey, cell: int) -> None:
        """Ends an admission: the record has been written."""
        self._cell_of[key], self._key_of[cell] = cell, key
        self._users[cell], self._values[cell] = 0, self.counts[key]

    def discard(self, cell: int) -> None:
        """Ends an admission whose record could not be written."""
        self._users[cell] = 0
        self._free.append(cell)

    def _count(self, key: ExpertKey) -> None:
        self.counts[key] += 1
        cell = self._cell_of.get(key)
        if cell is not None:
            self._values[cell] += 1
        self._until_halving -= 1
        if self._until_halving <= 0:
            self.counts /= 2
            self._values /= 2
            self._until_halving = self.HALVING * len(self._key_of)
