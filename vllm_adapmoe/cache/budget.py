"""How many slots a budget buys: pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError

GiB = 1 << 30


@dataclass(frozen=True)
class ExpertShape:
    """All layers whose experts have one shape; they share a pool of slots."""

    num_experts: int
    """Routed experts of all these layers together."""
    bytes_per_expert: int
    top_k: int
    """Slots that one token needs in one layer: the least a pool can work with."""


def count_slots(config: AdapMoEConfig, shapes: Sequence[ExpertShape], free_bytes: int) -> list[int]:
    """Slots of each pool under the configured budget, or, without one, under `free_bytes` of memory.

    Pools share the budget in proportion to their experts' bytes.

    Raises:
        AdapMoEError: the budget is below top-k slots, or names more slots than there are experts.
    """
    experts = sum(shape.num_experts for shape in shapes)
    total_bytes = sum(shape.num_experts * shape.bytes_per_expert for shape in shapes)
    if config.cache_experts is not None:
        key, fraction = f"cache_experts={config.cache_experts}", config.cache_experts / experts
        if fraction > 1:
            raise AdapMoEError(f"{key} is more than the {experts} routed experts of this model; set at most {experts}")
    elif config.cache_fraction is not None:
        key, fraction = f"cache_fraction={config.cache_fraction}", config.cache_fraction
    elif config.cache_gb is not None:
        key, fraction = f"cache_gb={config.cache_gb}", min(1.0, config.cache_gb * GiB / total_bytes)
    else:
        key, fraction = f"free memory of {free_bytes / GiB:.2f} GiB", min(1.0, max(0, free_bytes) / total_bytes)
    slots = [int(shape.num_experts * fraction + 1e-9) for shape in shapes]
    for shape, count in zip(shapes, slots, strict=True):
        if count < shape.top_k:
            needed = shape.top_k / shape.num_experts
            raise AdapMoEError(
                f"{key} gives {count} expert slots of {shape.bytes_per_expert / GiB:.3f} GiB, but a token needs "
                f"{shape.top_k} at once; set at least cache_gb={needed * total_bytes / GiB:.3f} "
                f"or cache_fraction={needed:.3f}"
            )
    return slots
