"""CacheSetup: slots and policies of an expert cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # a cache runs with torch and numpy alone
    from vllm_adapmoe.config import AdapMoEConfig


@dataclass(frozen=True)
class CacheSetup:
    """The user's settings of a cache."""

    slots: Sequence[int]
    """Number of slots of each pool."""
    eviction: str = "lru"
    allocation: str = "pool"
    """Floors, the minimum slots per layer protected from eviction. `pool`: none. `uniform`: equal for all layers.
    `profile`: by `curves`. `trace`: by the traffic so far, revised as it goes on."""
    curves: Sequence[Sequence[float]] | None = None
    """Expected loads of each layer with 0, 1, .. slots; for `profile`."""
    lookahead: int = 0
    """Maximum number of layers ahead to prefetch for; 0: no prefetch."""
    max_experts: int = 0
    """Maximum prefetches in flight, and maximum staging slots of each pool (`staging`)."""

    @classmethod
    def from_config(
        cls,
        config: "AdapMoEConfig",
        slots: Sequence[int],
        curves: Sequence[Sequence[float]] | None,
        heads: bool = False,
    ) -> Self:
        """Returns the setup for a configuration and pools of `slots`; `heads`: next-token heads are available."""
        prefetch = config.prefetch
        default = "next_token" if heads else "next_use"
        eviction = default if config.eviction == "auto" else config.eviction
        return cls(slots, eviction, config.allocation, curves, prefetch.lookahead, prefetch.max_experts)

    def staging(self, slots: int, num_experts: int) -> int:
        """Returns the number of staging slots of a pool of `slots` for layers of `num_experts`.

        At most an eighth of the pool, and only slots beyond one whole layer: with fewer, steps would need more waves.
        """
        return max(0, min(self.max_experts, slots // 8, slots - num_experts)) if self.lookahead else 0
