"""What the next layers' gates, applied to an earlier layer's input, say: pure functions and counters on arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR = 0.6
"""Chance that a predicted expert is used, before anything was counted; worth `PRIOR_WEIGHT` observations."""
PRIOR_WEIGHT = 8.0
MEMORY = 512.0
"""Observations after which old ones have faded to 1/e: precision follows the traffic."""


@dataclass(frozen=True)
class PredictedExperts:
    """Experts that a later layer is predicted to choose, token by token, the best first."""

    ids: np.ndarray
    """Integer `[tokens, top_k]`."""
    kept: np.ndarray
    """Bool `[tokens, top_k]`, False for what gating would drop."""


def predict_experts(
    logits: np.ndarray,
    top_k: int,
    sensitivity: float = 0.0,
    threshold: float = 0.0,
    by_batch: bool = False,
    correction: np.ndarray | None = None,
) -> PredictedExperts:
    """Ranks a gate's logits, and predicts what gating will keep (`gating`).

    Args:
        logits: `[tokens, experts]`, of the later layer's gate on this layer's input.
        top_k: experts of a token.
        sensitivity: of the later layer; with `threshold`, the rule `c * S < T`.
        threshold: 0 keeps all.
        by_batch: gating by batch, which drops an absent expert if that costs all its tokens less than the threshold;
            else by token.
        correction: `[experts]`, added to sigmoid scores before ranking, where the router does so.
    """
    rank = logits if correction is None else 1 / (1 + np.exp(-logits)) + correction
    ids = (-rank).argsort(axis=1, kind="stable")[:, :top_k]
    kept = np.ones(ids.shape, dtype=bool)
    if threshold > 0 and top_k > 1:
        chosen = np.take_along_axis(logits, ids, 1)
        weights = np.exp(chosen - chosen[:, :1])
        weights /= weights.sum(1, keepdims=True)
        if by_batch:
            rest = (weights**2).sum(1, keepdims=True) - weights**2
            costs = ((weights / (1 - weights)) ** 2 * rest + weights**2) / 2
            prices = np.bincount(ids.ravel(), costs.ravel(), minlength=logits.shape[1]) * sensitivity
            return PredictedExperts(ids, prices[ids] >= threshold)
        squares = np.cumsum(weights**2, axis=1)[:, :-1]
        inside = np.cumsum(weights, axis=1)[:, :-1]
        costs = (((1 - inside) / inside) ** 2 * squares + (weights**2).sum(1, keepdims=True) - squares) / 2
        kept[:, 1:] = costs * sensitivity >= threshold
    return PredictedExperts(ids, kept)


class Precision:
    """How often the best, second best, .. predicted expert is used, counted as the model runs.

    Args:
        top_k: ranks: experts of a token, in the layer that chooses most.
    """

    def __init__(self, top_k: int) -> None:
        self.right = [PRIOR_WEIGHT * PRIOR] * top_k
        self.seen = PRIOR_WEIGHT

    @property
    def by_rank(self) -> list[float]:
        """`[top_k]`."""
        return [right / self.seen for right in self.right]

    def record(self, predicted: PredictedExperts, used: Sequence[set[int]]) -> None:
        """Compares a prediction with the event it was of.

        Args:
            predicted: of the event's tokens.
            used: of each token, the experts that it used.
        """
        fade = math.exp(-len(used) / MEMORY)
        ids = predicted.ids.tolist()
        ranks = predicted.ids.shape[1]
        self.right = [
            fade * right + (rank < ranks and sum(row[rank] in its for row, its in zip(ids, used, strict=True)))
            for rank, right in enumerate(self.right)
        ]
        self.seen = fade * self.seen + len(used)


def chances(predicted: PredictedExperts, precision: Sequence[float]) -> dict[int, float]:
    """Probability that any token of the batch uses an expert: `1 - prod (1 - b_rank)` over the tokens that rank it.

    Plain Python: in a decode step it sees a few numbers, for which arrays are slow.

    Args:
        predicted: of every token of the step.
        precision: by rank. A prediction may have fewer ranks, where layers differ in top-k; of more, the rest is left
            out.

    Returns:
        By expert; those that no token is predicted to keep are left out.
    """
    unused: dict[int, float] = {}
    for row, kept in zip(predicted.ids.tolist(), predicted.kept.tolist(), strict=True):
        for expert, stays, share in zip(row, kept, precision, strict=False):
            if stays:
                unused[expert] = unused.get(expert, 1.0) * (1 - share)
    return {expert: 1 - chance for expert, chance in unused.items()}
