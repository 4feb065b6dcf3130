"""Decode steps drawn from published statistics: who is used, who is kept, who is foretold."""

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
    """Integer: what the router chose."""
    kept: np.ndarray
    """Bool: what gating keeps."""
    said: np.ndarray
    """Integer: what is predicted of the layer from the one before."""

    def predicted(self, layer: int, gated: bool) -> PredictedExperts:
        """Of one layer; that gating drops an expert is predicted rightly, since nothing is published of that."""
        kept = self.kept[layer] if gated else np.ones_like(self.kept[layer])
        return PredictedExperts(self.said[layer, None], kept[None])


def draw_tokens(shape: Shape, count: int, seed: int) -> list[Token]:
    """Experts are uniform and independent, for nothing is published of their popularity or of reuse between tokens.

    A prediction names an expert that is used as often as the layer's recall says, and else one that is not.
    """
    chance = np.random.default_rng(seed)
    layers, top_k = shape.layers, shape.top_k
    single = np.zeros(layers) if shape.single is None else np.asarray(shape.single)
    recall = np.zeros(layers) if shape.recall is None else np.asarray(shape.recall)
    tokens = []
    for _ in range(count):
        order = chance.random((layers, shape.experts)).argsort(1)
        ids, others = order[:, :top_k], order[:, top_k : 2 * top_k]
        kept = np.ones((layers, top_k), dtype=bool)
        kept[:, 1:] = (chance.random(layers) >= single)[:, None]
        said = np.where(chance.random((layers, top_k)) < recall[:, None], ids, others)
        tokens.append(Token(ids, kept, said))
    return tokens


def curves(shape: Shape, gated: bool, max_experts: int) -> list[Sequence[float]]:
    """Expected loads of each layer by its slots, for `allocation=profile`, from the same statistics."""
    single = shape.single if gated and shape.single is not None else [0.0] * shape.layers
    recall = shape.recall if max_experts and shape.recall is not None else [0.0] * shape.layers
    return [
        expected_loads(
            shape.experts,
            1 + (shape.top_k - 1) * (1 - alone),
            [right, *[right * (1 - alone)] * (shape.top_k - 1)],
            max_experts,
        ).tolist()
        for alone, right in zip(single, recall, strict=True)
    ]
