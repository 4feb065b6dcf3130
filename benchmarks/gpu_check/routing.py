"""Draws decode steps from published statistics: which experts are used, kept by gating, and predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.policy.allocation import expected_loads
from vllm_adapmoe.policy.prediction import PredictedExperts


@dataclass(frozen=True)
class Token:
    """One decode step at batch 1; arrays `[layers, top_k]`."""

    ids: np.ndarray
    """Experts chosen by the router, integer."""
    kept: np.ndarray
    """Whether gating keeps each expert, bool."""
    predicted_ids: np.ndarray
    """Experts predicted for the layer from the previous layer, integer."""

    def predicted(self, layer: int, gated: bool) -> PredictedExperts:
        """Returns the prediction for one layer; which experts gating drops is assumed known, for lack of statistics."""
        kept = self.kept[layer] if gated else np.ones_like(self.kept[layer])
        return PredictedExperts(self.predicted_ids[layer, None], kept[None])


def draw_tokens(shape: Shape, count: int, seed: int) -> list[Token]:
    """Draws tokens with uniform, independent experts, since no statistics of popularity or reuse are published.

    With the probability of the layer's recall, a prediction names an expert that is used; otherwise one that is not.
    """
    chance = np.random.default_rng(seed)
    layers, top_k = shape.layers, shape.top_k
    single = np.zeros(layers) if shape.single is None else np.asarray(shape.single)
    recall = np.zeros(layers) if shape.recall is None else np.asarray(shape.recall)
    tokens = []
    for _ in range(count):
        order = chance.random((layers, shape.experts)).argsort(1)
        ids, unselected = order[:, :top_k], order[:, top_k : 2 * top_k]
        kept = np.ones((layers, top_k), dtype=bool)
        kept[:, 1:] = (chance.random(layers) >= single)[:, None]
        predicted = np.where(chance.random((layers, top_k)) < recall[:, None], ids, unselected)
        tokens.append(Token(ids, kept, predicted))
    return tokens


def curves(shape: Shape, gated: bool, max_experts: int) -> list[Sequence[float]]:
    """Returns the expected loads of each layer by slots, for `allocation=profile`, from the same statistics."""
    single = shape.single if gated and shape.single is not None else [0.0] * shape.layers
    recall = shape.recall if max_experts and shape.recall is not None else [0.0] * shape.layers
    return [
        expected_loads(
            shape.experts,
            1 + (shape.top_k - 1) * (1 - alone),
            [precision, *[precision * (1 - alone)] * (shape.top_k - 1)],
            max_experts,
        ).tolist()
        for alone, precision in zip(single, recall, strict=True)
    ]
