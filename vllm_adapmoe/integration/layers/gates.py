"""Applies the adaptive gating rules of `vllm_adapmoe.gating` to the experts that vLLM's router chose in a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.gating.rules import Gated, gate_batch, gate_by_weight, gate_to_count, gate_tokens


@dataclass
class GateStats:
    """Counters of one layer since its gate was set."""

    gated_tokens: int = 0
    kept_experts: int = 0
    loss_spent: float = 0.0
    """Predicted loss of all dropping so far, in nats, before the profile's scale."""


class LayerGate:
    """Adaptive gate of one layer: decides which of the chosen experts each token keeps.

    Args:
        plan: the gating rule and its parameters.
        layer: index among the model's MoE layers.
    """

    def __init__(self, plan: GatingPlan, layer: int) -> None:
        self.plan = plan
        self.sensitivity = plan.sensitivity[layer]
        self.threshold = plan.threshold
        """Current threshold in nats; `LossBudget` adjusts it if a loss budget is set."""
        self.stats = GateStats()
        self._generator = torch.Generator().manual_seed(layer)

    def alone(self, weights: torch.Tensor) -> Gated | None:
        """Gates each token by itself, on the device of `weights` `[tokens, top_k]`; None if the rule needs a batch."""
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
        """Gates the tokens of a batch together, by which experts are resident.

        Args:
            weights: `[tokens, top_k]`, float32, on the host.
            ids: `[tokens, top_k]`, on the host.
            present: returns bool `[experts]`, on the host: experts that need no fetch.
        """
        return gate_batch(weights, ids, self.sensitivity, self.threshold, present())

    def count(self, keep: torch.Tensor, cost: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Adds a step to `stats`; returns `keep` with padding masked out.

        Args:
            keep: bool `[tokens, top_k]`, on the host.
            cost: float64 `[tokens]`, on the host.
            real: bool `[tokens]`, on the host; False for padding, which keeps nothing. None: no padding.
        """
        if real is not None:
            keep, cost = keep & real.unsqueeze(1), cost[real]
        self.stats.gated_tokens += len(cost)
        self.stats.kept_experts += int(keep.count_nonzero())
        self.stats.loss_spent += self.sensitivity * float(cost.sum())
        return keep


def total(stats: Sequence[GateStats]) -> dict[str, float]:
    """Sums counters over layers: gated tokens (once per layer), kept experts, and predicted loss."""
    return {key: sum(getattr(one, key) for one in stats) for key in ("gated_tokens", "kept_experts", "loss_spent")}
