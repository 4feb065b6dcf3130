"""Gating: the adaptive gates of a worker's MoE layers, with one plan, one threshold and one loss budget."""

from dataclasses import dataclass

import torch

from vllm_adapmoe.gating.loss_budget import LossBudget
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.gating.rules import Gated, gate_batch, gate_by_weight, gate_to_count, gate_tokens


@dataclass
class GateStats:
    """Counters of one layer since its gate was set."""

    gated_tokens: int = 0
    kept_experts: int = 0
    loss_spent: float = 0.0
    """Predicted loss of all dropping so far, in nats, before the profile's scale."""


class Gating:
    """Adaptive gating of all MoE layers of a worker.

    Args:
        plan: the gating rule and its parameters, for as many layers as the model has.
    """

    def __init__(self, plan: GatingPlan) -> None:
        self.plan = plan
        self.threshold = plan.threshold
        """Current threshold in nats, of all layers; the loss budget adjusts it, if there is one."""
        self.layers = [LayerGate(self, layer) for layer in range(len(plan.sensitivity))]
        self._budget = None
        if plan.nats_per_token is not None:
            self._budget = LossBudget(plan.threshold, plan.nats_per_token)
        self.step_nats = 0.0
        """Predicted loss of the running step, in nats, as counted so far."""

    def end_step(self, rows: int, prompt_rows: int) -> None:
        """Adjusts the threshold by the loss of a step, to keep the loss budget.

        Args:
            rows: number of rows of the step. A row that verifies a draft token counts as a token, accepted or not: it
                was gated like the others, so the mean over rows estimates the loss of a token that is output.
            prompt_rows: those of prompts, which lose next to nothing, as they need every expert.
        """
        nats, self.step_nats = self.step_nats, 0.0
        if self._budget is not None and rows and not prompt_rows:
            self._budget.threshold = self.threshold
            self.threshold = self._budget.spend(nats, rows)


class LayerGate:
    """Adaptive gate of one layer: decides which of the chosen experts each token keeps.

    Args:
        gating: plan and threshold, shared by all layers.
        layer: index among the model's MoE layers.
    """

    def __init__(self, gating: Gating, layer: int) -> None:
        self.gating = gating
        self.sensitivity = gating.plan.sensitivity[layer]
        self.stats = GateStats()
        self._generator = torch.Generator().manual_seed(layer)

    @property
    def plan(self) -> GatingPlan:
        return self.gating.plan

    @property
    def threshold(self) -> float:
        return self.gating.threshold

    @property
    def needs_residency(self) -> bool:
        """Whether the rule asks which experts are resident: known to whom decides, the host or the GPU."""
        return self.plan.rule == "batch"

    def gate_each(self, weights: torch.Tensor, by_token: Gated | None = None) -> Gated | None:
        """Gates each token by itself, on the device of `weights`; None if the rule needs a batch.

        Args:
            weights: `[tokens, top_k]`.
            by_token: what the rule `token` gives for them, if the model has computed it. A compiled model computes it
                although another rule has been set since.
        """
        plan = self.plan
        if plan.rule == "token":
            return gate_tokens(weights, self.sensitivity, self.threshold) if by_token is None else by_token
        if plan.rule == "weight":
            return gate_by_weight(weights, self.threshold)
        if plan.rule == "batch":
            return None
        assert plan.experts is not None
        return gate_to_count(weights, plan.experts, self._generator)

    def gate_together(
        self, weights: torch.Tensor, ids: torch.Tensor, resident: torch.Tensor, real: torch.Tensor | None
    ) -> Gated:
        """Gates the tokens of a batch together, by which experts are resident.

        Args:
            weights: `[tokens, top_k]`, float32, on the host.
            ids: `[tokens, top_k]`, on the host.
            resident: bool `[experts]`, on the host: experts that need no fetch.
            real: bool `[tokens]`, on the host; False for padding, which comes last and has no part in prices. None: no
                padding.
        """
        rows = len(ids) if real is None else int(real.sum())
        gated = gate_batch(weights[:rows], ids[:rows], self.sensitivity, self.threshold, resident)
        return Gated(*(torch.cat((part, part.new_zeros(len(ids) - rows, *part.shape[1:]))) for part in gated))

    def count(self, keep_mask: torch.Tensor, cost: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Adds a layer of the running step to `stats`; returns the mask with padding masked out.

        Args:
            keep_mask: bool `[tokens, top_k]`, on the host.
            cost: float64 `[tokens]`, on the host.
            real: bool `[tokens]`, on the host; False for padding, which keeps nothing. None: no padding.
        """
        if real is not None:
            keep_mask, cost = keep_mask & real.unsqueeze(1), cost[real]
        self.gating.step_nats += self.count_finished(keep_mask, cost)
        return keep_mask

    def count_finished(self, keep_mask: torch.Tensor, cost: torch.Tensor) -> float:
        """Adds a layer of a step that has run; returns the predicted loss in nats. Arguments as in `count`."""
        nats = self.sensitivity * float(cost.sum())
        self.stats.gated_tokens += len(cost)
        self.stats.kept_experts += int(keep_mask.count_nonzero())
        self.stats.loss_spent += nats
        return nats
