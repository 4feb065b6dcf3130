"""What to fetch ahead: pure decisions of one worker."""

from collections.abc import Callable, Sequence

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.prediction import Precision, PredictedExperts, chances

RequestPrefetch = Callable[[ExpertKey, bool], bool]
"""Asked of an expert, and told whether speculation is sure of it; True if it has to be loaded."""
PredictExperts = Callable[[int], PredictedExperts | None]
"""Gives the prediction of the layer that is so many layers later; None: it cannot be foretold."""

LEAST_CHANCE = 0.5
"""Below it a prefetch is more likely wasted than used."""
CERTAIN_PROB = 0.9
"""From here on a prefetch is as good as asked for: it counts for no limit, and may displace what is resident."""
SWEEP_MISSES = 0.01
"""A step whose prompts leave out no more than this share of a layer's experts is a sweep over all of them."""


class PrefetchPlanner:
    """Looks ahead from layer to layer, and ranks what is missing by the chance that it is used.

    Experts of a pool have one size, so the chance also ranks the stall that a prefetch is expected to save.

    Args:
        num_experts: of each MoE layer.
        top_k: experts of a token, in the layer that chooses most.
        lookahead: layers to look ahead at most: further only while there is nothing to fetch for the nearer ones.
        max_experts: most that speculation may have under way.
    """

    def __init__(self, num_experts: Sequence[int], top_k: int, lookahead: int, max_experts: int) -> None:
        self.num_experts = list(num_experts)
        self.top_k = top_k
        self.prompt_tokens = 0
        """Of the step under way."""
        self.lookahead = lookahead
        self.max_experts = max_experts
        layers = len(num_experts)
        self.precision = [[Precision(top_k) for _ in range(lookahead)] for _ in range(layers)]
        self.pending: list[dict[int, PredictedExperts]] = [{} for _ in range(layers)]
        """Of each layer, by lookahead, what was predicted for its next event."""

    def record(self, layer: int, ids: np.ndarray, kept: np.ndarray) -> None:
        """The router of `layer` has spoken.

        Args:
            layer: MoE layer index.
            ids: integer `[tokens, top_k]`.
            kept: bool `[tokens, top_k]`.
        """
        pending = self.pending[layer]
        said = [(distance, predicted) for distance, predicted in pending.items() if len(predicted.ids) == len(ids)]
        pending.clear()
        if not said:
            return
        used = [
            {expert for expert, stays in zip(row, its, strict=True) if stays}
            for row, its in zip(ids.tolist(), kept.tolist(), strict=True)
        ]
        for distance, predicted in said:
            self.precision[layer][distance - 1].record(predicted, used)

    def is_sweep(self, layer: int) -> bool:
        """Whether the step's prompts, with `top_k` of the experts at random, need nearly all of a layer's.

        Real routing is uneven: it leaves out a few more. Gating drops next to nothing that a whole prompt wants.
        """
        left_out = (1 - min(1.0, self.top_k / self.num_experts[layer])) ** self.prompt_tokens
        return left_out <= SWEEP_MISSES

    def begin_step(
        self, prompt_tokens: int, chances: Sequence[np.ndarray], request: RequestPrefetch
    ) -> list[ExpertKey]:
        """What to fetch before a step, the first layer's first.

        Args:
            prompt_tokens: of the step.
            chances: of the first layers, float `[experts]`: that the step uses each expert.
            want: `plan`.
        """
        self.prompt_tokens = prompt_tokens
        if self.is_sweep(0):
            return self._sweep(-1, request)
        chosen: list[ExpertKey] = []
        for layer, one in enumerate(chances[: self.lookahead]):
            self._choose(layer, dict(enumerate(one.tolist())), request, chosen)
            if chosen:
                break
        return chosen

    def _sweep(self, layer: int, request: RequestPrefetch) -> list[ExpertKey]:
        """All of the next layer that is not there: while one layer computes, another one's experts arrive."""
        for target in range(layer + 1, min(layer + 1 + self.lookahead, len(self.num_experts))):
            keys = [(target, expert) for expert in range(self.num_experts[target])]
            if chosen := [key for key in keys if request(key, True)]:
                return chosen
        return []

    def _choose(self, layer: int, chance: dict[int, float], request: RequestPrefetch, chosen: list[ExpertKey]) -> None:
        """Adds experts of a layer to `chosen`."""
        room = self.max_experts
        for expert in sorted(chance, key=lambda expert: (-chance[expert], expert)):
            sure = chance[expert] >= CERTAIN_PROB
            if chance[expert] < LEAST_CHANCE or not (sure or room):
                break
            if request((layer, expert), sure):
                chosen.append((layer, expert))
                room -= not sure

    def plan(
        self, layer: int, predict_experts: PredictExperts, request: RequestPrefetch, under_way: int
    ) -> list[ExpertKey]:
        """What to fetch while `layer` runs, the likeliest first.

        Looking costs time in every layer, so nothing is predicted that could not be fetched.

        Args:
            layer: whose input the predictions are made from; -1: the step has ended.
            predict_experts: asked for predictions, the nearest first.
            want: asked of each candidate, and told whether it is sure; True if it has to be loaded.
            under_way: speculative loads that have not ended.
        """
        if 0 <= layer < len(self.num_experts) - 1 and self.is_sweep(layer + 1):
            return self._sweep(layer, request)
        chosen: list[ExpertKey] = []
        for distance in range(1, min(self.lookahead, len(self.num_experts) - 1 - layer) + 1):
            if chosen or under_way:
                break
            one = predict_experts(distance)
            if one is None:
                continue
            target = layer + distance
            self.pending[target][distance] = one
            chance = chances(one, self.precision[target][distance - 1].by_rank)
            self._choose(target, chance, request, chosen)
        return chosen
