"""What the host takes back from a GPU that has decided which experts are in which slots, and what that has counted."""

from dataclasses import dataclass

import numpy as np

from vllm_adapmoe.experts import ExpertKey


@dataclass(frozen=True)
class GpuState:
    """State of a pool; arrays are `[layers, experts]`."""

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
    prefetched: list[ExpertKey]
    """Experts that were prefetched, and not used since."""


@dataclass(frozen=True)
class GpuCounts:
    """What a GPU has counted in one pool since the last time."""

    prefetches: int
    prefetch_hits: int
    prefetches_wasted: int
    hits: np.ndarray
    """Of each layer, int64 `[layers]`."""
    misses: np.ndarray
    """Of each layer, int64 `[layers]`."""
    residents: np.ndarray
    """Resident experts of each layer now, int32 `[layers]`."""
