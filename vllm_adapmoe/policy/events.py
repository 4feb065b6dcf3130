"""States of experts, and what a layer's event decides: loads, hits, promotions, waves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeVar

import numpy as np

from vllm_adapmoe.experts import ExpertKey


class State(Enum):
    """State of one expert. `ABSENT` experts have no entry."""

    ABSENT = "absent"
    QUEUED = "queued"
    """Requested by a prefetch, without a slot yet."""
    LOADING = "loading"
    STAGED = "staged"
    """Prefetched, not requested by its layer yet."""
    RESIDENT = "resident"


@dataclass(slots=True)
class Entry:
    """Entry of an expert that is queued, loading or staged."""

    state: State
    slot: int = -1
    speculative: bool = False
    near_certain: bool = False
    """Prefetch of near-certain use, which may evict resident experts."""
    cancelled: bool = False
    """Load in flight that is not needed any more; it stops at the next tile."""


class Load(NamedTuple):
    """A load of `key` into `slot`, from which `evicted` was evicted."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None = None


@dataclass(slots=True)
class Request:
    """Outcome of one event of a layer."""

    loads: list[Load] = field(default_factory=list)
    """Demand loads to issue."""
    hits: int = 0
    """Number of experts that were resident."""
    promoted: list[Load] = field(default_factory=list)
    """Experts that were staged and are resident now; `evicted` was evicted for them."""
    awaited: list[Load] = field(default_factory=list)
    """Experts whose load was in flight; it has demand priority from now on."""
    cancelled: list[ExpertKey] = field(default_factory=list)
    """Mispredicted prefetches of this layer; loads in flight stop at the next tile."""


Experts = TypeVar("Experts", Sequence[int], np.ndarray)


def waves(experts: Experts, capacity: int) -> list[Experts]:
    """Splits a layer's distinct experts, ascending, into groups that fit the slots.

    Depends on the routing and the slot count alone: what happens to be resident must not change an output.
    """
    return [experts[start : start + capacity] for start in range(0, len(experts), capacity)]
