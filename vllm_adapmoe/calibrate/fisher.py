"""Measures sensitivities by back-propagation with transformers."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.gating.rules import largest_mask, rescale_kept
from vllm_adapmoe.profile.statistics import Sums, half
from vllm_adapmoe.store.host_memory import host_memory

EXPERT_ARGUMENTS = ("top_k_index", "top_k_weights")
BATCH = 4
"""Sequences per backward pass."""


class Fisher:
    """A transformers model with hooks on its MoE layers that record the gradient of the loss at their outputs.

    When every token keeps only its `half(top_k)` best experts, a layer's output moves by d. With g the gradient of the
    loss at that output, the loss changes by `g.d + 1/2 d.H.d`, and the Hessian H is approximated by the Fisher matrix,
    the mean of g g^T:  S_l = sum 1/2 (g.d)^2 / sum c  over tokens, c being the cost of that dropping (`gating`). With
    top-2 that is half the mean squared derivative along E1 - E2, tokens weighted by W^2 as in eq. 8 of AdapMoE.

    Args:
        model: folder of a checkpoint.

    Raises:
        AdapMoEError: transformers does not call the model's experts with `top_k_index` and `top_k_weights`.
    """

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        layers = [module for module in self.model.modules() if _is_experts(module)]
        if not layers:
            raise AdapMoEError(
                f"model={str(model)!r}: transformers does not pass {' and '.join(EXPERT_ARGUMENTS)} to "
                "its experts; use --method forward"
            )
        self.gradients: dict[int, torch.Tensor] = {}
        self.moves: dict[int, torch.Tensor] = {}
        self.costs: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            layer.forward = self._watch(index, layer.forward)
        self.num_layers = len(layers)

    def _watch(self, index: int, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            output = forward(hidden_states, top_k_index, top_k_weights)
            if not output.requires_grad:  # the first MoE layer: no parameter requires a gradient
                output.requires_grad_(True)
            with torch.no_grad():
                weights = top_k_weights.float()
                keep_mask = largest_mask(weights, torch.full((len(weights),), half(weights.shape[1])))
                fewer = rescale_kept(weights, keep_mask)
                moved = forward(hidden_states.detach(), top_k_index, fewer.weights.to(top_k_weights.dtype))
                self.moves[index], self.costs[index] = moved - output.detach(), fewer.cost
            output.register_hook(lambda gradient: self.gradients.__setitem__(index, gradient))
            return output

        return watched

    def sums(self, sequences: list[list[int]]) -> Sums:
        """Returns sums over tokens, `[layers]` each: `second` of 1/2 (g.d)^2, `cost` of c."""
        result = {key: np.zeros(self.num_layers) for key in ("second", "cost")}
        for start in range(0, len(sequences), BATCH):
            ids = torch.tensor(sequences[start : start + BATCH])
            with torch.enable_grad():
                logits = self.model(ids, use_cache=False).logits[:, :-1].float()
                F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            for layer in range(self.num_layers):
                along = (self.gradients[layer].double() * self.moves[layer].double()).flatten(0, -2).sum(-1)
                result["second"][layer] += 0.5 * along.square().sum().item()
                result["cost"][layer] += self.costs[layer].double().sum().item()
        return result


def fits_in_memory(model: Path) -> bool:
    """Returns whether the checkpoint fits in host memory in float32, with room for gradients of activations."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return 3 * weights < host_memory().available


def _is_experts(module: torch.nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return all(name in parameters for name in EXPERT_ARGUMENTS)
