"""Expert keys and the shape of a model's experts: the types that all packages share."""

from collections.abc import Sequence
from dataclasses import dataclass

ExpertKey = tuple[int, int]
"""Key of an expert: (MoE layer index, expert index within the layer)."""


@dataclass(frozen=True)
class CacheShape:
    """The model's experts as the cache needs to know them: numbers, sizes and pools."""

    num_experts: Sequence[int]
    """Number of experts of each MoE layer."""
    top_k: int
    """Experts per token; the maximum where layers differ."""
    pool_of: Sequence[int]
    """Pool index of each MoE layer: layers with equally shaped experts share a pool."""
    expert_bytes: Sequence[int]
    """Bytes per expert of each MoE layer."""
    local_experts: Sequence[Sequence[int]] | None = None
    """Experts of each MoE layer that this rank holds; other ranks fetch and run the rest. None: all."""
