"""Gating rules: which of the experts selected by the router a token keeps, and with which weights.

Pure functions on `weights` and `ids`, `[tokens, top_k]`, in any order along top_k. Weights may sum to one (renormalised
routers), to less (plain softmax) or to a scaling factor. The kept weights are scaled to the same sum, which
renormalises where the router does and keeps the token's share of the block's output where it does not.

**The price of dropping experts.** Let the kept weights be w_i, the dropped ones v_j, K and W their sums. Rescaling what
is kept moves the block's output by `W * (mean of kept experts - mean of dropped experts)`, each mean weighted within
its group. For experts whose outputs differ equally (AdapMoE eq. 7) its expected square is

    c = 1/2 * ((W / K)^2 * sum w_i^2 + sum v_j^2)

in units of the expected square of the difference of two experts, and the expected increase of the loss is `c * S`, S
being the layer's sensitivity. With top-2 and one expert dropped c = W^2, the paper's rule (eq. 8). c falls as more is
kept.
"""

from itertools import accumulate
from typing import NamedTuple

import torch


class Gated(NamedTuple):
    """Routing of a step after gating."""

    keep_mask: torch.Tensor
    """Mask of kept experts, bool `[tokens, top_k]`, at least one in each row."""
    weights: torch.Tensor
    """Weights `[tokens, top_k]`: zero where dropped, the rest scaled to the router's sum."""
    cost: torch.Tensor
    """Cost c of what each token dropped, float64 `[tokens]`."""


def drop_costs(sorted_weights: torch.Tensor) -> torch.Tensor:
    """Returns the cost c of keeping the first 1, 2, .. top_k experts; the last is zero.

    Args:
        sorted_weights: `[tokens, top_k]`, descending.

    Returns:
        float64 `[tokens, top_k]`, non-increasing along the last dimension, except for rounding.
    """
    exact = sorted_weights.double()
    return _costs(exact.cumsum(-1), exact.square().cumsum(-1))


def _costs(kept: torch.Tensor, kept_squares: torch.Tensor) -> torch.Tensor:
    """Returns the costs of keeping the first 1, 2, .. experts, from their running sums.

    The sums are float64: the dropped part is a difference of sums near one, where float32 loses the square of 1e-4.
    """
    moved = kept[:, -1:] / kept - 1  # W / K
    return 0.5 * (moved.square() * kept_squares + (kept_squares[:, -1:] - kept_squares))


def gate_tokens(weights: torch.Tensor, sensitivity: float | torch.Tensor, threshold: float | torch.Tensor) -> Gated:
    """Keeps, for each token, the fewest experts whose dropping cost is below the threshold, at least one.

    `c * S < T`, as in the authors' code, where the paper writes <=: so a threshold of zero drops nothing. NaN weights
    drop nothing either, and reach the kernel as in stock vLLM.

    A decode step runs this in every layer. It is written so that `torch.compile` makes one kernel of it, at the expense
    of readability: sort, cumsum and scatter would each be a call of its own. Weights are added one by one, in
    descending order: no compiler may add them in another, so that compiled and eager models gate alike to the last bit.

    Args:
        weights: `[tokens, top_k]`.
        sensitivity: S of the layer, nats per token; a tensor is float64, without dimensions.
        threshold: T, maximum loss of one token in one layer, nats; a tensor is float64, without dimensions.
    """
    exact = weights.double()
    place = torch.arange(exact.shape[1], device=exact.device)
    own, other = exact.unsqueeze(2), exact.unsqueeze(1)
    # Number of larger weights; of equal ones the first counts as larger. NaN ranks first, and makes all costs NaN.
    rank = torch.where(place < place.unsqueeze(1), other >= own, other > own).sum(-1)
    ordered = torch.where(rank.unsqueeze(1) == place.unsqueeze(1), other, 0.0).sum(-1)
    terms = torch.stack((ordered, ordered.square()), -1).unbind(1)
    kept, kept_squares = torch.stack(list(accumulate(terms)), 1).unbind(-1)
    costs = _costs(kept, kept_squares)
    last_kept = (~(costs[:, :-1] * sensitivity < threshold)).sum(-1, keepdim=True)  # rank of the last one kept
    keep_mask = rank <= last_kept
    scale = kept[:, -1:] / kept.gather(-1, last_kept)  # exactly one where all are kept
    return Gated(keep_mask, weights * keep_mask * scale.to(weights.dtype), costs.gather(-1, last_kept).squeeze(-1))


def rescale_kept(weights: torch.Tensor, keep_mask: torch.Tensor) -> Gated:
    """Scales the kept weights to the router's sum, and computes the cost of the others; full rows stay unchanged."""
    kept, dropped = weights * keep_mask, weights * ~keep_mask
    scale = weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    sums = [values.sum(-1) for part in (kept.double(), dropped.double()) for values in (part, part.square())]
    return Gated(keep_mask, kept * scale, _cost(*sums))


def largest_mask(weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns a mask `[tokens, top_k]` of the `counts` (`[tokens]`) largest weights; of equal ones the first."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, ranks < counts.unsqueeze(-1))


def gate_by_weight(weights: torch.Tensor, threshold: float) -> Gated:
    """Drops the smallest experts while their share of the weight is below `threshold`, in any layer: a baseline."""
    kept = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    dropped = 1 - kept[:, :-1] / kept[:, -1:]
    return rescale_kept(weights, largest_mask(weights, 1 + (~(dropped < threshold)).sum(-1)))


def gate_to_count(weights: torch.Tensor, experts: float, generator: torch.Generator) -> Gated:
    """Keeps a fixed smaller top-k; the fractional part is the share of tokens, drawn at random, that keep one more."""
    whole = int(experts)
    keeps_one_more = torch.rand(weights.shape[0], generator=generator) < experts - whole
    return rescale_kept(weights, largest_mask(weights, whole + keeps_one_more.to(weights.device).long()))


def gate_batch(
    weights: torch.Tensor, ids: torch.Tensor, sensitivity: float, threshold: float, resident: torch.Tensor
) -> Gated:
    """Drops non-resident experts from the whole batch where that costs all its tokens together less than the threshold.

    A fetch is saved only if no token of the batch keeps the expert, so its price is the loss summed over the batch.
    Experts are dropped cheapest first, and prices are updated: a token that lost one expert pays more for the next, and
    its last expert is never dropped. Resident experts need no fetch and are kept. At batch 1 this drops what
    `gate_tokens` drops, where that is not resident.

    Args:
        weights: `[tokens, top_k]`, float32, on the host.
        ids: `[tokens, top_k]`, expert ids, on the host.
        sensitivity: S of the layer, nats per token.
        threshold: maximum loss for saving one fetch, nats.
        resident: bool `[experts]`.
    """
    ids = ids.long()
    keep_mask = torch.ones_like(ids, dtype=torch.bool)
    absent = ~resident[ids]
    exact = weights.double()  # a price is a small difference of sums that may be near one
    squares = exact.square()
    while True:
        candidates = keep_mask & absent
        if not candidates.any():
            return rescale_kept(weights, keep_mask)
        kept, kept_squares, dropped, dropped_squares = (
            (values * mask).sum(-1, keepdim=True) for mask in (keep_mask, ~keep_mask) for values in (exact, squares)
        )
        before = _cost(kept, kept_squares, dropped, dropped_squares)
        after = _cost(kept - exact, kept_squares - squares, dropped + exact, dropped_squares + squares)
        has_one_left = keep_mask.sum(-1, keepdim=True) == 1
        prices = torch.where(has_one_left, torch.inf, (after - before) * sensitivity)
        price = torch.zeros(resident.shape[0], dtype=exact.dtype)
        price.index_add_(0, ids[candidates], prices[candidates])
        price[_without_candidates(ids, candidates, resident.shape[0])] = torch.inf
        # Drops at once all experts that are the cheapest of each of their tokens: the same as one by one, since none
        # of them changes another's price.
        rank = torch.empty_like(price, dtype=torch.int64)
        rank[price.argsort(stable=True)] = torch.arange(len(price))
        ranks = torch.where(candidates, rank[ids], len(price))
        beaten = candidates & (ranks > ranks.min(-1, keepdim=True).values)
        to_drop = price < threshold
        to_drop[ids[beaten]] = False
        if not to_drop.any():
            return rescale_kept(weights, keep_mask)
        keep_mask &= ~(to_drop[ids] & candidates)


def _cost(
    kept: torch.Tensor, kept_squares: torch.Tensor, dropped: torch.Tensor, dropped_squares: torch.Tensor
) -> torch.Tensor:
    return 0.5 * ((dropped / kept).square() * kept_squares + dropped_squares)


def _without_candidates(ids: torch.Tensor, candidates: torch.Tensor, experts: int) -> torch.Tensor:
    """Returns a mask `[experts]` of those that no candidate pair of token and expert refers to."""
    return torch.bincount(ids[candidates], minlength=experts) == 0
