"""GpuState: what the host takes back from a GPU that has decided which experts are in which slots."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GpuState:
    """State of a pool; all arrays are `[layers, experts]`."""

    slots: np.ndarray
    """Slot of each expert, int32; -1: not resident."""
    free: list[int]
    """Free slots; the last is taken first."""
    wait: np.ndarray
    """Waits, as in `EvictionPolicy`, int64."""
    quick: np.ndarray
    """As in `NextUse`, like `slow`, int32; without meaning for other policies."""
    slow: np.ndarray
    events: int
    """Number of events so far, with `LRU`."""
    last_layer: int
    """Layer of the last event."""
