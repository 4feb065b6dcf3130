"""Names of experts, and the shape of a model's experts: the words that all rooms share."""

from collections.abc import Sequence
from dataclasses import dataclass

ExpertKey = tuple[int, int]
"""(MoE layer index, expert index within the layer)."""


@dataclass(frozen=True)
class CacheShape:
    """The model's side of a cache."""

    num_experts: Sequence[int]
    """Of each MoE layer."""
    top_k: int
    """Experts of a token, in the layer that chooses most."""
    pool_of: Sequence[int]
    """Pool of each MoE layer: layers whose experts have one shape share one."""
    expert_bytes: Sequence[int]
    """Bytes of an expert of each MoE layer."""
    held: Sequence[Sequence[int]] | None = None
    """Experts of each MoE layer that this rank holds, the others being other ranks' to fetch and to run. None: all."""
