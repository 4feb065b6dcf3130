"""Adaptive gating in a layer: the rules of `gating`, applied to what vLLM's router chose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_adapmoe.gating import Gated, gate_batch, gate_by_weight, gate_to_count, gate_tokens
from vllm_adapmoe.gating_plan import GatingPlan


@dataclass
class GateStats:
    """Counted since the gate was set, for one layer."""

    gated_tokens: int = 0
    kept_experts: int = 0
    loss_spent: float = 0.0
    """Nats that all dropping together is foretold to have cost, before the profile's scale."""


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

    def apply(
        self,
        weights: torch.Tensor,
        ids: torch.Tensor,
        real: torch.Tensor | None,
        present: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights after gating, and the mask of what is kept.

        Args:
            weights: `[tokens, top_k]`, float32.
            ids: `[tokens, top_k]`, on the host.
            real: bool `[tokens]`, on the host; False for padding, which keeps nothing. None: all are real.
            present: gives bool `[experts]`, on the host: those that need no fetch.

        Returns:
            Rescaled weights, on their device, and bool `[tokens, top_k]`, on the host.
        """
        gated = self._gate(weights, ids, present)
        keep, cost = gated.keep.cpu(), gated.cost.cpu()
        if real is not None:
            keep, cost = keep & real.unsqueeze(1), cost[real]
        self.stats.gated_tokens += len(cost)
        self.stats.kept_experts += int(keep.count_nonzero())
        self.stats.loss_spent += self.sensitivity * float(cost.sum())
        return gated.weights, keep

    def _gate(self, weights: torch.Tensor, ids: torch.Tensor, present: Callable[[], torch.Tensor]) -> Gated:
        plan = self.plan
        if plan.rule == "token":
            return gate_tokens(weights, self.sensitivity, self.threshold)
        if plan.rule == "batch":
            gated = gate_batch(weights.cpu(), ids, self.sensitivity, self.threshold, present())
            return Gated(*(tensor.to(weights.device) for tensor in gated))
        if plan.rule == "weight":
            return gate_by_weight(weights, self.threshold)
        assert plan.experts is not None
        return gate_to_count(weights, plan.experts, self._generator)


def total(stats: Sequence[GateStats]) -> dict[str, float]:
    """Sums over layers: tokens times layers, experts that they kept, and the loss that was foretold of it."""
    return {key: sum(getattr(one, key) for one in stats) for key in ("gated_tokens", "kept_experts", "loss_spent")}
