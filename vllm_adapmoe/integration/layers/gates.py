"""Adaptive gating in a layer: the rules of `gating`, applied to what vLLM's router chose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.gating.rules import Gated, gate_batch, gate_by_weight, gate_to_count, gate_tokens


@dataclass
class GateStats:
    """Counted since the gate was set, for one layer."""

    gated_tokens: int = 0
    kept_experts: int = 0
    loss_spent: float = 0.0
    """Nats that all dropping together is predicted to have cost, before the profile's scale."""


class LayerGate:
    """Gate of one layer.

    Args:
        plan: the rule and its numbers.
        layer: index among the model's MoE layers.
    """

    def __init__(self, plan: GatingPlan, layer: int) -> None:
        self.plan = plan
        self.sensitivity = plan.sensitivity[layer]
        self.threshold = plan.threshold
        """Nats, from here on; moves where a budget is spent (`LossBudget`)."""
        self.stats = GateStats()
        self._generator = torch.Generator().manual_seed(layer)

    def alone(self, weights: torch.Tensor) -> Gated | None:
        """What each token keeps by itself, on the device of `weights` `[tokens, top_k]`; None: it takes the batch."""
        plan = self.plan
        if plan.rule == "token":
            return gate_tokens(weights, self.sensitivity, self.threshold)
        if plan.rule == "weight":
            return gate_by_weight(weights, self.threshold)
        if plan.rule == "batch":
            return None
        assert plan.experts is not None
        return gate_to_count(weights, plan.experts, self._generator)

    def with_batch(self, weights: torch.Tensor, ids: torch.Tensor, present: Callable[[], torch.Tensor]) -> Gated:
        """What the batch keeps.

        Args:
            weights: `[tokens, top_k]`, float32, on the host.
            ids: `[tokens, top_k]`, on the host.
            present: gives bool `[experts]`, on the host: those that need no fetch.
        """
        return gate_batch(weights, ids, self.sensitivity, self.threshold, present())

    def count(self, keep: torch.Tensor, cost: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Counts what has been gated; returns what real tokens keep.

        Args:
            keep: bool `[tokens, top_k]`, on the host.
            cost: float64 `[tokens]`, on the host.
            real: bool `[tokens]`, on the host; False for padding, which keeps nothing. None: all are real.
        """
        if real is not None:
            keep, cost = keep & real.unsqueeze(1), cost[real]
        self.stats.gated_tokens += len(cost)
        self.stats.kept_experts += int(keep.count_nonzero())
        self.stats.loss_spent += self.sensitivity * float(cost.sum())
        return keep


def total(stats: Sequence[GateStats]) -> dict[str, float]:
    """Sums over layers: tokens times layers, experts that they kept, and the loss that was predicted of it."""
    return {key: sum(getattr(one, key) for one in stats) for key in ("gated_tokens", "kept_experts", "loss_spent")}
