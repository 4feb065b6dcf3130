"""Gating rules as functions: the paper's rule, identities, monotony, and what routers promise of their weights."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_adapmoe.gating.rules import (
    Gated,
    drop_costs,
    gate_batch,
    gate_by_weight,
    gate_to_count,
    gate_tokens,
    rescale_kept,
)

EXPERTS = 32
KINDS = ("renormalised", "softmax", "scaled", "sigmoid with bias", "grouped")


def route(kind: str, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Weights, ids, and what the weights of a token sum to where the convention fixes it."""
    if kind == "sigmoid with bias":  # DeepSeek V3: chosen with the bias, weighted without; not in order of weight
        scores = logits.sigmoid()
        bias = torch.linspace(-0.5, 0.5, EXPERTS)
        ids = (scores + bias).topk(top_k).indices
        weights = scores.gather(1, ids)
        return 2.5 * weights / weights.sum(-1, keepdim=True), ids, 2.5
    scores = logits.softmax(-1)
    if kind == "grouped":
        best = scores.view(len(scores), 4, -1).amax(-1).topk(2).indices
        allowed = torch.zeros(len(scores), 4).scatter_(1, best, 1).repeat_interleave(EXPERTS // 4, dim=1)
        weights, ids = (scores * allowed).topk(top_k, sorted=False)
        return weights, ids, None
    weights, ids = scores.topk(top_k)
    if kind == "renormalised":
        return weights / weights.sum(-1, keepdim=True), ids, 1.0
    return (weights * 2.5 if kind == "scaled" else weights), ids, None


TOP_K = st.integers(2, 8)


@st.composite
def routed(draw, top_k=TOP_K):
    """A routing of a few tokens by any kind of router, its choices in any order."""
    kind, k = draw(st.sampled_from(KINDS)), draw(top_k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = draw(st.integers(1, 12))
    logits = torch.randn(tokens, EXPERTS, generator=generator) * draw(st.floats(0.1, 4))
    weights, ids, total = route(kind, logits, k)
    order = torch.stack([torch.randperm(k, generator=generator) for _ in range(tokens)])
    return weights.gather(1, order), ids.gather(1, order), total


thresholds = st.floats(1e-6, 10)
sensitivities = st.floats(1e-3, 50)


def gate_by_sorting(weights: torch.Tensor, sensitivity: float, threshold: float) -> Gated:
    """The token rule as one would write it for eager PyTorch."""
    ordered, order = weights.double().sort(dim=-1, descending=True, stable=True)
    kept, costs = ordered.cumsum(-1), drop_costs(ordered)
    last_kept = (~(costs[:, :-1] * sensitivity < threshold)).sum(-1, keepdim=True)
    keep_mask = (torch.arange(weights.shape[1]) <= last_kept).gather(-1, order.argsort(-1))
    scale = (kept[:, -1:] / kept.gather(-1, last_kept)).float()
    return Gated(keep_mask, weights * keep_mask * scale, costs.gather(-1, last_kept).squeeze(-1))


@given(routed(st.integers(1, 8)), sensitivities, st.just(0.0) | thresholds, st.randoms(use_true_random=False))
def test_token_rule_is_that_of_sorted_weights_to_the_last_bit(routing, sensitivity, threshold, random):
    weights = routing[0].clone()
    for special in (weights[0, 0].item(), float("nan"), float("inf"), float("-inf"), 0.0):  # the first one is a tie
        if random.random() < 0.3:
            weights[random.randrange(len(weights)), random.randrange(weights.shape[1])] = special
    limits = torch.tensor([sensitivity, threshold], dtype=torch.float64)
    expected = gate_by_sorting(weights, sensitivity, threshold)
    for gated in (gate_tokens(weights, sensitivity, threshold), gate_tokens(weights, *limits)):
        for ours, theirs in zip(gated, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@given(routed(st.just(2)), sensitivities, thresholds)
def test_top_2_is_the_papers_rule(routing, sensitivity, threshold):
    weights, _, _ = routing
    alpha = weights.amax(-1).double()
    dropped = weights.amin(-1).double()
    keep = gate_tokens(weights, sensitivity, threshold).keep_mask
    cost, limit = dropped**2, threshold / sensitivity  # of a renormalised router (1 - alpha)^2 S < T
    single = cost < limit
    clear = (cost - limit).abs() > 1e-5 * limit  # otherwise rounding to float32 decides
    assert torch.equal((keep.sum(-1) == 1)[clear], single[clear])
    kept_alpha = torch.where(keep, weights, 0).amax(-1).double()
    assert torch.equal(kept_alpha, alpha)


@given(routed(), sensitivities)
def test_threshold_zero_is_the_identity(routing, sensitivity):
    weights, _, _ = routing
    gated = gate_tokens(weights, sensitivity, 0.0)
    assert gated.keep_mask.all()
    assert torch.equal(gated.weights, weights)
    assert (gated.cost == 0).all()


@given(routed(), sensitivities, st.lists(thresholds, min_size=2, max_size=5))
def test_count_falls_with_the_threshold(routing, sensitivity, values):
    weights, _, _ = routing
    for rule in (
        lambda t: gate_tokens(weights, sensitivity, t).keep_mask,
        lambda t: gate_by_weight(weights, t).keep_mask,
    ):
        masks = [rule(value) for value in sorted(values)]
        for less, more in itertools.pairwise(masks):
            assert (less >= more).all(), "what a higher threshold keeps, a lower one keeps too"
        assert all((mask.sum(-1) >= 1).all() for mask in masks)


@given(routed(), sensitivities, thresholds)
def test_kept_weights_sum_to_the_routers_convention(routing, sensitivity, threshold):
    weights, _, total = routing
    keep, kept, cost = gate_tokens(weights, sensitivity, threshold)
    again = rescale_kept(weights, keep)
    torch.testing.assert_close(again.weights, kept, rtol=1e-5, atol=0)
    torch.testing.assert_close(again.cost, cost, rtol=1e-4, atol=1e-14)
    torch.testing.assert_close(kept.sum(-1), weights.sum(-1), rtol=1e-5, atol=0)
    if total is not None:
        torch.testing.assert_close(kept.sum(-1), torch.full((len(kept),), total), rtol=1e-5, atol=0)
    assert (kept[~keep] == 0).all()
    proportions = (kept / weights)[keep]
    first = (kept / weights).amax(-1, keepdim=True).expand_as(kept)[keep]
    torch.testing.assert_close(proportions, first, rtol=1e-5, atol=0)


@given(routed(), sensitivities, thresholds, st.randoms(use_true_random=False))
def test_order_of_the_choices_does_not_matter(routing, sensitivity, threshold, random):
    weights, _, _ = routing
    order = list(range(weights.shape[1]))
    random.shuffle(order)
    there = gate_tokens(weights, sensitivity, threshold).keep_mask[:, order]
    here = gate_tokens(weights[:, order], sensitivity, threshold).keep_mask
    ties = (weights.unsqueeze(1) == weights.unsqueeze(2)).sum((1, 2)) > weights.shape[1]
    assert torch.equal(here[~ties], there[~ties])


@given(routed(), st.integers(0, 2**32))
def test_cost_is_the_expected_square_of_the_move(routing, seed):
    """With outputs of independent experts, E |y - y'|^2 over E |e1 - e2|^2 is c (Monte Carlo over the outputs)."""
    weights, _, _ = routing
    ordered = weights.sort(dim=-1, descending=True).values[:1]
    outputs = torch.randn(ordered.shape[1], 60_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kept, cost in enumerate(drop_costs(ordered)[0].tolist(), start=1):
        gated = rescale_kept(ordered, (torch.arange(ordered.shape[1]) < kept).unsqueeze(0))
        move = (gated.weights - ordered).double() @ outputs
        assert move.square().mean().item() / 2 == pytest.approx(cost, rel=0.05, abs=1e-6)
        assert gated.cost.item() == pytest.approx(cost, rel=1e-3, abs=1e-6)


@given(routed())
def test_costs_fall_as_more_is_kept(routing):
    weights, _, _ = routing
    costs = drop_costs(weights.sort(dim=-1, descending=True).values)
    assert (costs[:, :-1] >= costs[:, 1:] - 1e-14).all()
    assert (costs[:, -1] == 0).all()


@given(routed(), sensitivities)
def test_costs_are_exact_however_little_is_dropped(routing, sensitivity):
    """Those of rational arithmetic: little is lost to the rounding of sums near one."""
    weights, _, _ = routing
    ordered = weights[:1].sort(dim=-1, descending=True).values
    exact = [Fraction(weight) for weight in ordered[0].tolist()]
    for count, cost in enumerate(drop_costs(ordered)[0].tolist(), start=1):
        kept, dropped = exact[:count], exact[count:]
        expected = float(((sum(dropped) / sum(kept)) ** 2 * sum(w * w for w in kept) + sum(v * v for v in dropped)) / 2)
        assert cost == pytest.approx(expected, rel=1e-6, abs=1e-14)
        keep = (torch.arange(len(exact)) < count).unsqueeze(0)
        assert rescale_kept(ordered, keep).cost.item() == pytest.approx(expected, rel=1e-6)
        for threshold, goes in ((expected * 0.999, False), (expected * 1.001, True)):
            if expected > 1e-12:
                remaining = gate_tokens(ordered, sensitivity, threshold * sensitivity).keep_mask.sum()
                assert (remaining <= count) == goes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_numbers_pass_through(value):
    """Stock vLLM computes on; a token with such weights keeps all experts, and others are not touched."""
    logits = torch.randn(3, EXPERTS, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = value
    weights, _, _ = route("renormalised", logits, 4)
    keep, kept, _ = gate_tokens(weights, 1.0, 0.01)
    if weights[1].isnan().any():
        assert keep[1].all()
        assert kept[1].isnan().any()
    assert torch.equal(keep[[0, 2]], gate_tokens(weights[[0, 2]], 1.0, 0.01).keep_mask)


@given(routed(), st.floats(1, 8))
def test_fixed_count(routing, experts):
    weights, _, _ = routing
    experts = min(experts, weights.shape[1])
    counts = gate_to_count(weights, experts, torch.Generator().manual_seed(0)).keep_mask.sum(-1)
    assert ((counts == int(experts)) | (counts == int(experts) + 1)).all()
    assert gate_to_count(weights, float(int(experts)), torch.Generator()).keep_mask.sum(-1).eq(int(experts)).all()


# By batch


def greedy(weights, ids, sensitivity, threshold, resident):
    """The same rule, one expert at a time, in Python and double precision."""
    weights = weights.double()
    kept = [set(range(weights.shape[1])) for _ in weights]

    def cost(token, choices):
        w = [weights[token, choice].item() for choice in choices]
        v = [weights[token, c].item() for c in range(weights.shape[1]) if c not in choices]
        return 0.5 * ((sum(v) / sum(w)) ** 2 * sum(x * x for x in w) + sum(x * x for x in v))

    margin = float("inf")
    while True:
        prices: dict[int, float] = {}
        for token, choices in enumerate(kept):
            for choice in choices:
                expert = int(ids[token, choice])
                if resident[expert]:
                    continue
                if len(choices) == 1:
                    price = float("inf")
                else:
                    price = sensitivity * (cost(token, choices - {choice}) - cost(token, choices))
                prices[expert] = prices.get(expert, 0.0) + price
        ranked = sorted((price, expert) for expert, price in prices.items())
        if ranked and ranked[0][0] != float("inf"):
            margin = min(margin, abs(ranked[0][0] / threshold - 1))
            if len(ranked) > 1:
                margin = min(margin, ranked[1][0] / ranked[0][0] - 1)
        if not ranked or ranked[0][0] >= threshold:
            mask = torch.tensor([[c in choices for c in range(weights.shape[1])] for choices in kept])
            return mask, margin
        for token, choices in enumerate(kept):
            kept[token] = {c for c in choices if int(ids[token, c]) != ranked[0][1]}


residents = st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).map(torch.tensor)


@given(routed(), sensitivities, thresholds, residents)
def test_batch_rule_is_greedy_by_price(routing, sensitivity, threshold, resident):
    weights, ids, _ = routing
    expected, margin = greedy(weights, ids, sensitivity, threshold, resident)
    keep = gate_batch(weights, ids, sensitivity, threshold, resident).keep_mask
    if margin > 1e-3:  # otherwise rounding decides
        assert torch.equal(keep, expected)
    assert (keep.sum(-1) >= 1).all()


@given(routed(), sensitivities, thresholds, residents)
def test_batch_rule_drops_only_what_saves_a_fetch(routing, sensitivity, threshold, resident):
    weights, ids, _ = routing
    keep = gate_batch(weights, ids, sensitivity, threshold, resident).keep_mask
    assert keep[resident[ids]].all(), "a resident expert costs no fetch"
    for expert in ids[~keep].unique():
        assert not keep[ids == expert].any(), "dropped by some, kept by others: fetched all the same"
    assert gate_batch(weights, ids, sensitivity, threshold, torch.ones(EXPERTS, dtype=torch.bool)).keep_mask.all()
    assert gate_batch(weights, ids, sensitivity, 0.0, resident).keep_mask.all()


SMALL_SHARES = (  # the third is worth 6e-7 nats at a sensitivity of 17; 8e-7 with squares rounded to float32 near one
    torch.tensor([[1.0368e-03, 1.7603e-02, 1.9171e-04, 3.0619e-03, 9.7811e-01]]),
    torch.tensor([[26, 13, 18, 30, 27]]),
    None,
)


@given(routed(), sensitivities, thresholds)
@example(SMALL_SHARES, 17.0, 1e-6)
def test_batch_of_one_drops_what_the_token_rule_drops(routing, sensitivity, threshold):
    """Where nothing is resident: but each fetch has its own price, so a batch of one may drop more."""
    weights, ids, _ = routing
    nothing = torch.zeros(EXPERTS, dtype=torch.bool)
    for token in range(len(weights)):
        one, its = weights[token : token + 1], ids[token : token + 1]
        by_batch = gate_batch(one, its, sensitivity, threshold, nothing).keep_mask
        by_token = gate_tokens(one, sensitivity, threshold * (1 - 1e-3)).keep_mask
        assert (by_batch <= by_token).all()
        if weights.shape[1] == 2:
            assert (by_batch >= gate_tokens(one, sensitivity, threshold * (1 + 1e-3)).keep_mask).all()
