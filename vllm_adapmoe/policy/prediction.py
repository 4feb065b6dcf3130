"""Predicts a later layer's experts by applying its router to an earlier layer's input, and tracks the precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR = 0.6
"""Prior chance that a predicted expert is used; weighted as `PRIOR_WEIGHT` observations."""
PRIOR_WEIGHT = 8.0
MEMORY = 512.0
"""Observations after which the weight of an older one has faded to 1/e, so that precision follows the traffic."""


@dataclass(frozen=True)
class PredictedExperts:
    """Experts that the router of a later layer is predicted to select for each token, most probable first."""

    ids: np.ndarray
    """Predicted expert ids, integer `[tokens, top_k]`."""
    keep_mask: np.ndarray
    """Bool mask `[tokens, top_k]`, False where gating is predicted to drop the expert."""


def predict_experts(
    logits: np.ndarray,
    top_k: int,
    sensitivity: float = 0.0,
    threshold: float = 0.0,
    by_batch: bool = False,
    correction: np.ndarray | None = None,
) -> PredictedExperts:
    """Ranks a router's logits and predicts which experts gating will keep (`gating`).

    Args:
        logits: `[tokens, experts]`, of the later layer's router on this layer's input.
        top_k: experts per token.
        sensitivity: S of the later layer in the rule `c * S < T`.
        threshold: T in that rule; 0 keeps all.
        by_batch: gating by batch, which drops an absent expert if that costs all its tokens together less than the
            threshold; else by token.
        correction: `[experts]`, added to sigmoid scores before ranking, where the router does so.
    """
    rank = logits if correction is None else 1 / (1 + np.exp(-logits)) + correction
    ids = (-rank).argsort(axis=1, kind="stable")[:, :top_k]
    keep_mask = np.ones(ids.shape, dtype=bool)
    if threshold > 0 and top_k > 1:
        chosen = np.take_along_axis(logits, ids, 1)
        weights = np.exp(chosen - chosen[:, :1])
        weights /= weights.sum(1, keepdims=True)
        if by_batch:
            other_squares = (weights**2).sum(1, keepdims=True) - weights**2
            costs = ((weights / (1 - weights)) ** 2 * other_squares + weights**2) / 2
            prices = np.bincount(ids.ravel(), costs.ravel(), minlength=logits.shape[1]) * sensitivity
            return PredictedExperts(ids, prices[ids] >= threshold)
        squares = np.cumsum(weights**2, axis=1)[:, :-1]
        inside = np.cumsum(weights, axis=1)[:, :-1]
        costs = (((1 - inside) / inside) ** 2 * squares + (weights**2).sum(1, keepdims=True) - squares) / 2
        keep_mask[:, 1:] = costs * sensitivity >= threshold
    return PredictedExperts(ids, keep_mask)


class Precision:
    """Running precision of the predictions: how often the best, second best, .. predicted expert is used.

    Args:
        top_k: number of ranks: experts per token, the maximum where layers differ.
    """

    def __init__(self, top_k: int) -> None:
        self.correct = [PRIOR_WEIGHT * PRIOR] * top_k
        self.observed = PRIOR_WEIGHT

    @property
    def by_rank(self) -> list[float]:
        """Returns the precision of each rank, `[top_k]`."""
        return [correct / self.observed for correct in self.correct]

    def record(self, predicted: PredictedExperts, used: Sequence[set[int]]) -> None:
        """Updates the precision with one predicted event.

        Args:
            predicted: experts predicted for the event's tokens.
            used: experts that each token used.
        """
        fade = math.exp(-len(used) / MEMORY)
        ids = predicted.ids.tolist()
        ranks = predicted.ids.shape[1]
        self.correct = [
            fade * correct
            + (rank < ranks and sum(row[rank] in token_experts for row, token_experts in zip(ids, used, strict=True)))
            for rank, correct in enumerate(self.correct)
        ]
        self.observed = fade * self.observed + len(used)


def chances(predicted: PredictedExperts, precision: Sequence[float]) -> dict[int, float]:
    """Returns the chance that any token of the batch uses an expert: `1 - prod (1 - b_rank)` over tokens that rank it.

    Plain Python, because arrays are slow for the few numbers of a decode step.

    Args:
        predicted: experts predicted for every token of the step.
        precision: b by rank. A prediction may have fewer ranks, where layers differ in top-k; ranks beyond `precision`
            are ignored.

    Returns:
        Chance by expert id, without experts that no token is predicted to keep.
    """
    unused: dict[int, float] = {}
    for row, row_mask in zip(predicted.ids.tolist(), predicted.keep_mask.tolist(), strict=True):
        for expert, is_kept, rank_precision in zip(row, row_mask, precision, strict=False):
            if is_kept:
                unused[expert] = unused.get(expert, 1.0) * (1 - rank_precision)
    return {expert: 1 - chance for expert, chance in unused.items()}
