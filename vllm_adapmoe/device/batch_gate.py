"""Gates the tokens of a batch together on the GPU, where it is known which experts are resident (`gate_batch`)."""

from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_adapmoe.gating.loss_budget import next_threshold
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.gating.rules import Gated

UNIT = 1 << 40
"""Prices are summed over tokens as whole numbers of 1 / `UNIT` nats: in any order of threads the sum is the same, on
every rank."""
MAX_NATS = 1024.0
"""Price of what is never dropped; 64 tokens of it are far from the range of 64 bits."""


@triton.jit
def _cost(kept, kept_squares, dropped, dropped_squares):
    share = dropped / kept
    return 0.5 * (share * share * kept_squares + dropped_squares)


@triton.jit
def _sum(values, mask):
    return tl.sum(tl.where(mask, values, 0.0), 1, keep_dims=True)


@triton.jit(do_not_specialize=["layer", "tokens"])
def _gate_batch(
    ids, weights, step_rows, slot_of, sensitivities, threshold, prices, beaten, keep_mask, gated, costs,
    layer, tokens,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, MAX_NATS: tl.constexpr,
):  # fmt: skip
    token, choice = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (choice < TOP_K)
    place = token * TOP_K + choice
    chosen = tl.load(ids + place, mask=inside, other=-1).to(tl.int32)
    kept = inside & (chosen >= 0) & (token < tl.load(step_rows))
    given = tl.load(weights + place, mask=inside, other=0.0)
    exact = given.to(tl.float64)
    square = exact * exact
    slots = tl.load(slot_of + layer.to(tl.int64) * (EXPERTS + 1) + chosen, mask=kept, other=0)
    sensitivity = tl.load(sensitivities + layer)
    limit = (tl.minimum(tl.load(threshold), MAX_NATS) * UNIT).to(tl.int64)
    real, candidates = kept, kept & (slots < 0)
    never = tl.full([ROWS, COLUMNS], 1 << 62, tl.int64)
    zero = tl.zeros([ROWS, COLUMNS], tl.int64)
    dropping = 1
    while dropping > 0:
        # The price of each absent expert: what the tokens that keep it lose together without it.
        tl.store(prices + chosen, zero, mask=candidates)
        tl.store(beaten + chosen, zero.to(tl.int32), mask=candidates)
        lost = real & ~kept
        inside_sum, inside_squares = _sum(exact, kept), _sum(square, kept)
        outside_sum, outside_squares = _sum(exact, lost), _sum(square, lost)
        before = _cost(inside_sum, inside_squares, outside_sum, outside_squares)
        after = _cost(inside_sum - exact, inside_squares - square, outside_sum + exact, outside_squares + square)
        price = (after - before) * sensitivity
        price = tl.where(price < MAX_NATS, price, MAX_NATS)  # NaN, too, is never dropped
        last = tl.sum(kept.to(tl.int32), 1, keep_dims=True) == 1
        price = tl.where(last, MAX_NATS, price)
        tl.debug_barrier()
        tl.atomic_add(prices + chosen, (price * UNIT).to(tl.int64), mask=candidates, sem="relaxed")
        tl.debug_barrier()
        # All experts that are the cheapest of each of their tokens go at once: none of them changes another's price.
        total = tl.load(prices + chosen, mask=candidates, other=0)
        total = tl.where(candidates, total, never)
        least = tl.min(total, 1, keep_dims=True)
        first = tl.min(tl.where(candidates & (total == least), chosen, EXPERTS), 1, keep_dims=True)
        tl.atomic_max(
            beaten + chosen, (chosen * 0 + 1).to(tl.int32), mask=candidates & (chosen != first), sem="relaxed"
        )
        tl.debug_barrier()
        is_beaten = tl.load(beaten + chosen, mask=candidates, other=1)
        drop = candidates & (total < limit) & (is_beaten == 0)
        kept = kept & ~drop
        candidates = candidates & ~drop
        dropping = tl.max(tl.max(drop.to(tl.int32), 1), 0)
        tl.debug_barrier()
    lost = real & ~kept
    inside_sum, inside_squares = _sum(exact, kept), _sum(square, kept)
    outside_sum, outside_squares = _sum(exact, lost), _sum(square, lost)
    scale = tl.where(outside_sum > 0, (inside_sum + outside_sum) / inside_sum, 1.0)
    tl.store(keep_mask + place, kept.to(tl.uint8), mask=inside)
    tl.store(gated + place, tl.where(lost, 0.0, given * scale.to(tl.float32)), mask=inside)
    cost = _cost(inside_sum, inside_squares, outside_sum, outside_squares)
    cost = tl.where(outside_sum > 0, cost, 0.0)
    tl.store(costs + token, cost, mask=token < tokens)


class Adapted(Protocol):
    """A plan whose threshold is adapted (`Gating`)."""

    plan: GatingPlan
    threshold: float
    """In nats, on the host."""


class BatchGate:
    """Gates a worker's layers by batch, with a threshold that the device adapts to the loss budget.

    Args:
        gating: plan, and the threshold on the host, which is read by `upload` and set by `download`.
        experts: maximum experts of a layer.
        device: device of the slots.
    """

    def __init__(self, gating: Adapted, experts: int, device: torch.device) -> None:
        self.gating = gating
        self.sensitivity = torch.tensor(gating.plan.sensitivity, dtype=torch.float64).to(device)
        """Sensitivity of each layer, nats per token, float64 `[layers]`."""
        self.threshold = torch.full((1,), gating.threshold, dtype=torch.float64, device=device)
        """Current threshold, nats, float64 `[1]`."""
        self._prices = torch.zeros(experts, dtype=torch.int64, device=device)
        self._beaten = torch.zeros(experts, dtype=torch.int32, device=device)

    def __call__(
        self,
        layer: int,
        weights: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        slot_of: torch.Tensor,
    ) -> Gated:
        """Drops absent experts where that costs all tokens together less than the threshold. One launch.

        Args:
            layer: MoE layer index.
            weights: router weights, float32 `[tokens, top_k]`, contiguous.
            ids: the router's choice, int32 or int64 `[tokens, top_k]`, contiguous; -1: none.
            rows: number of rows that are no padding, int32 `[1]`.
            slot_of: slot of each expert of the pool's layers, -1 for absent ones, int32 `[layers, experts + 1]`.
        """
        tokens, top_k = ids.shape
        keep_mask, gated = torch.empty_like(ids, dtype=torch.bool), torch.empty_like(weights)
        costs = torch.empty(tokens, dtype=torch.float64, device=ids.device)
        _gate_batch[(1,)](
            ids, weights, rows, slot_of,
            self.sensitivity, self.threshold, self._prices, self._beaten, keep_mask.view(torch.uint8), gated, costs,
            layer, tokens,
            TOP_K=top_k, EXPERTS=slot_of.shape[1] - 1, ROWS=triton.next_power_of_2(tokens),
            COLUMNS=triton.next_power_of_2(top_k), UNIT=UNIT, MAX_NATS=MAX_NATS,
        )  # fmt: skip
        return Gated(keep_mask, gated, costs)

    def end_step(self, costs: torch.Tensor) -> None:
        """Adapts the threshold to what a decode step has lost; launches and waits for nothing.

        Args:
            costs: what each layer's gate dropped, as in `Gated.cost`, float64 `[layers, tokens]`, without padding.
        """
        plan = self.gating.plan
        if plan.nats_per_token is not None:
            share = self.sensitivity @ costs.sum(1) / (costs.shape[1] * plan.nats_per_token)
            self.threshold.copy_(next_threshold(self.threshold, share, plan.threshold))

    def upload(self) -> None:
        """Takes over the threshold from the host."""
        self.threshold.fill_(self.gating.threshold)

    def download(self) -> None:
        """Waits for the GPU, and hands the threshold to the host."""
        self.gating.threshold = self.threshold.item()
