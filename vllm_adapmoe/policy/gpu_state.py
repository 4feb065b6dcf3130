"""What the host takes back from a GPU that has decided which experts are in which slots, and what that has counted."""

from collections.abc import Sequence
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


def fitting_tokens(num_experts: Sequence[int], slots: Sequence[int], top_k: int, max_tokens: int) -> int:
    """Returns the maximum tokens, at most `max_tokens`, of a step whose experts are certain to fit the slots.

    Args:
        num_experts: number of experts of each layer.
        slots: slots of each layer's pool.
        top_k: experts per token, the maximum where layers differ.
        max_tokens: upper bound.
    """
    limits = [held // top_k for experts, held in zip(num_experts, slots, strict=True) if experts > held]
    return min([max_tokens, *limits])
