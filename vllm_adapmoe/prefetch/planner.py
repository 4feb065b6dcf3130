"""What to fetch ahead: pure decisions of one worker."""

from collections.abc import Callable, Sequence

import numpy as np

from vllm_adapmoe.cache.eviction import ExpertKey
from vllm_adapmoe.prefetch.foresight import Foretold, Precision, chances

Foretell = Callable[[int], Foretold | None]
"""Gives the prediction of the layer that is so many layers later; None: it cannot be foretold."""

LEAST_CHANCE = 0.5
"""Below it a prefetch is more likely wasted than used."""


class PrefetchPlanner:
    """Looks ahead from layer to layer, and ranks what is missing by the chance that it is used.

    Experts of a pool have one size, so the chance also ranks the stall that a prefetch is expected to save.

    Args:
        num_experts: of each MoE layer.
        top_k: experts of a token.
        lookahead: layers to look ahead at most: further only while there is nothing to fetch for the nearer ones.
        max_experts: most that speculation may have under way.
    """

    def __init__(self, num_experts: Sequence[int], top_k: int, lookahead: int, max_experts: int) -> None:
        self.num_experts = list(num_experts)
        self.lookahead = lookahead
        self.max_experts = max_experts
        layers = len(num_experts)
        self.precision = [[Precision(top_k) for _ in range(lookahead)] for _ in range(layers)]
        self.pending: list[dict[int, Foretold]] = [{} for _ in range(layers)]
        """Of each layer, by lookahead, what was foretold for its next event."""

    def record(self, layer: int, ids: np.ndarray, kept: np.ndarray) -> None:
        """The router of `layer` has spoken.

        Args:
            layer: MoE layer index.
            ids: integer `[tokens, top_k]`.
            kept: bool `[tokens, top_k]`.
        """
        pending = self.pending[layer]
        said = [(distance, foretold) for distance, foretold in pending.items() if len(foretold.ids) == len(ids)]
        pending.clear()
        if not said:
            return
        used = [
            {expert for expert, stays in zip(row, its, strict=True) if stays}
            for row, its in zip(ids.tolist(), kept.tolist(), strict=True)
        ]
        for distance, foretold in said:
            self.precision[layer][distance - 1].record(foretold, used)

    def plan(
        self, layer: int, foretell: Foretell, want: Callable[[ExpertKey], bool], under_way: int
    ) -> list[ExpertKey]:
        """What to fetch while `layer` runs, the likeliest first.

        Looking costs time in every layer, so nothing is foretold that could not be fetched.

        Args:
            layer: whose input the predictions are made from.
            foretell: asked for predictions, the nearest first.
            want: asked of each candidate; True if it has to be loaded.
            under_way: speculative loads that have not ended.
        """
        chosen: list[ExpertKey] = []
        for distance in range(1, min(self.lookahead, len(self.num_experts) - 1 - layer) + 1):
            if chosen or under_way:
                break
            one = foretell(distance)
            if one is None:
                continue
            target = layer + distance
            self.pending[target][distance] = one
            chance = chances(one, self.precision[target][distance - 1].by_rank)
            for expert in sorted(chance, key=lambda expert: (-chance[expert], expert)):
                if len(chosen) == self.max_experts or chance[expert] < LEAST_CHANCE:
                    break
                if want((target, expert)):
                    chosen.append((target, expert))
        return chosen
