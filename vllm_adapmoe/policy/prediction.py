"""Predicts a later layer's experts by applying its router to an earlier layer's input, and tracks the precision."""

import math
from typing import NamedTuple

import numpy as np

from vllm_adapmoe.policy.compiled import compiled

PRIOR = 0.6
"""Prior chance that a predicted expert is used; weighted as `PRIOR_WEIGHT` observations."""
PRIOR_WEIGHT = 8.0
MEMORY = 512.0
"""Observations after which the weight of an older one has faded to 1/e, so that precision follows the traffic."""


class PredictedExperts(NamedTuple):
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
    ids = highest(rank, min(top_k, rank.shape[1]))
    keep_mask = np.empty(ids.shape, dtype=bool)
    if threshold > 0 and top_k > 1:
        predict_gating = _kept_by_batch if by_batch else _kept_by_token
        predict_gating(logits, ids, sensitivity, threshold, keep_mask)
    else:
        keep_mask.fill(True)
    return PredictedExperts(ids, keep_mask)


class Precision:
    """Running precision of the predictions: how often the best, second best, .. predicted expert is used.

    Args:
        top_k: number of ranks: experts per token, the maximum where layers differ.
    """

    def __init__(self, top_k: int) -> None:
        self.correct = np.full(top_k, PRIOR_WEIGHT * PRIOR)
        self.observed = PRIOR_WEIGHT

    @property
    def by_rank(self) -> np.ndarray:
        """Returns the precision of each rank, float64 `[top_k]`."""
        return self.correct / self.observed

    def record(self, predicted: PredictedExperts, ids: np.ndarray, keep_mask: np.ndarray) -> None:
        """Updates the precision with one predicted event.

        Args:
            predicted: experts predicted for the event's tokens.
            ids: experts that the router selected, integer `[tokens, top_k]`.
            keep_mask: those that gating kept, bool `[tokens, top_k]`.
        """
        fade = math.exp(-len(ids) / MEMORY)
        self.correct *= fade
        _count_used(predicted.ids, ids, keep_mask, self.correct)
        self.observed = fade * self.observed + len(ids)


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the highest values of each row, descending, int64 `[rows, count]`; the first of equals.

    Args:
        values: `[rows, columns]`.
        count: at most the number of columns.
    """
    columns = np.empty((len(values), count), np.int64)
    _highest(values, columns)
    return columns


@compiled
def _highest(values: np.ndarray, columns: np.ndarray) -> None:
    count = columns.shape[1]
    best = np.empty(count, values.dtype)
    for row in range(len(values)):
        filled = 0
        for column in range(values.shape[1]):
            value = values[row, column]
            if filled == count and not value > best[count - 1]:
                continue
            place = filled if filled < count else count - 1
            while place > 0 and value > best[place - 1]:
                best[place] = best[place - 1]
                columns[row, place] = columns[row, place - 1]
                place -= 1
            best[place] = value
            columns[row, place] = column
            filled = min(filled + 1, count)


@compiled
def _weights(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the softmax of the logits of each row's `ids`, float64 `[tokens, top_k]`."""
    weights = np.empty(ids.shape)
    for token in range(len(ids)):
        total = 0.0
        for rank in range(ids.shape[1]):
            weights[token, rank] = math.exp(logits[token, ids[token, rank]] - logits[token, ids[token, 0]])
            total += weights[token, rank]
        weights[token] /= total
    return weights


@compiled
def _kept_by_token(
    logits: np.ndarray, ids: np.ndarray, sensitivity: float, threshold: float, keep_mask: np.ndarray
) -> None:
    """Writes the mask of what `gate_tokens` keeps."""
    weights = _weights(logits, ids)
    keep_mask[:] = True
    for token in range(len(ids)):
        squares = (weights[token] ** 2).sum()
        inside = inside_squares = 0.0
        for rank in range(1, ids.shape[1]):
            inside += weights[token, rank - 1]
            inside_squares += weights[token, rank - 1] ** 2
            cost = (((1 - inside) / inside) ** 2 * inside_squares + squares - inside_squares) / 2
            keep_mask[token, rank] = cost * sensitivity >= threshold


@compiled
def _kept_by_batch(
    logits: np.ndarray, ids: np.ndarray, sensitivity: float, threshold: float, keep_mask: np.ndarray
) -> None:
    """Writes the mask of what `gate_batch` keeps of experts that are not resident."""
    weights = _weights(logits, ids)
    prices = np.zeros(logits.shape[1])
    for token in range(len(ids)):
        squares = (weights[token] ** 2).sum()
        for rank in range(ids.shape[1]):
            weight = weights[token, rank]
            cost = ((weight / (1 - weight)) ** 2 * (squares - weight**2) + weight**2) / 2
            prices[ids[token, rank]] += cost * sensitivity
    for token in range(len(ids)):
        for rank in range(ids.shape[1]):
            keep_mask[token, rank] = prices[ids[token, rank]] >= threshold


@compiled
def _count_used(predicted: np.ndarray, ids: np.ndarray, keep_mask: np.ndarray, used: np.ndarray) -> None:
    """Adds to `used` `[ranks]` how many tokens kept the expert predicted at that rank."""
    for token in range(len(predicted)):
        for rank in range(min(predicted.shape[1], len(used))):
            for choice in range(ids.shape[1]):
                if keep_mask[token, choice] and ids[token, choice] == predicted[token, rank]:
                    used[rank] += 1
                    break


def chances(ids: np.ndarray, keep_mask: np.ndarray, precision: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns the chance that any token of the batch uses an expert: `1 - prod (1 - b_rank)` over tokens that rank it.

    Args:
        ids: predicted for every token of the step (`PredictedExperts`).
        keep_mask: of the same.
        precision: b by rank, float64. A prediction may have fewer ranks, where layers differ in top-k; ranks beyond
            `precision` are ignored.
        num_experts: number of experts of the layer.

    Returns:
        float64 `[num_experts]`; 0 for experts that no token is predicted to keep.
    """
    result = np.empty(num_experts)
    write_chances(ids, keep_mask, precision, result)
    return result


@compiled
def write_chances(ids: np.ndarray, keep_mask: np.ndarray, precision: np.ndarray, result: np.ndarray) -> None:
    """Writes `chances` to `result` `[num_experts]`."""
    result[:] = 1
    for token in range(len(ids)):
        for rank in range(min(ids.shape[1], len(precision))):
            if keep_mask[token, rank]:
                result[ids[token, rank]] *= 1 - precision[rank]
    for expert in range(len(result)):
        result[expert] = 1 - result[expert]
