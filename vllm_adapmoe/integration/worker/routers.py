"""Finds the routers of a model's MoE layers, and which of them can be predicted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.worker.gate_trial import LinearGate, Unpredictable, try_gate

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


class Routers:
    """The routers of a model's MoE layers, each found and tested on demand.

    Args:
        layers: the model's MoE layers, in order.
        model: the model that contains the routers.
        runners: vLLM's MoE runners, by layer name.
    """

    def __init__(self, layers: Sequence[CachedExperts], model: torch.nn.Module, runners: Mapping[str, Any]) -> None:
        self.layers = layers
        self.runners = [runners[layer.layer_name] for layer in layers]
        self.num_experts = [layer.moe_config.num_logical_experts for layer in layers]
        self._blocks = _blocks_around(self.runners, model)
        self.follow_weights()

    def follow_weights(self) -> None:
        """Reads the routers' corrections from the model's weights, at first or after they were replaced."""
        self.corrections = [_correction(runner.router) for runner in self.runners]
        """Correction of each layer, `[experts]`, added to sigmoid scores before ranking; None: no correction."""
        self._reasons: dict[int, str] = {}

    def linear(self, index: int, dtype: torch.dtype, device: torch.device) -> LinearGate | None:
        """Returns a layer's router as a linear map of its experts' input; None if it is not linear.

        The reason is kept for `report`.

        Args:
            index: index of the layer.
            dtype: dtype of the input.
            device: device of the weights.
        """
        try:
            gate, hidden, experts = self._gate(index), self.layers[index].hidden_size, self.num_experts[index]
            try:
                return try_gate(gate, hidden, experts, dtype, device)
            except Unpredictable as error:
                raise Unpredictable(f"{type(gate).__name__}: {error}") from None
        except Unpredictable as error:
            self._reasons[index] = " ".join(str(error).split())
            return None

    def _gate(self, index: int) -> torch.nn.Module:
        """Finds the module that computes a layer's logits: the runner's gate, or `gate` or `router` of its block.

        Raises:
            Unpredictable: there is none, or the choice does not depend on such logits alone.
        """
        runner, block, correction = self.runners[index], self._blocks[index], self.corrections[index]
        if getattr(runner.router, "_hash_indices_table", None) is not None:
            raise Unpredictable("the token's id selects the experts")
        if correction is not None and correction.shape != (self.num_experts[index],):
            raise Unpredictable(f"its correction has {len(correction)} entries for {self.num_experts[index]} experts")
        gate = runner.gate
        if gate is None and runner.routed_input_transform is not None:
            raise Unpredictable("its input differs from the experts' input")
        if gate is None and block is not None:
            gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if not isinstance(gate, torch.nn.Module):
            raise Unpredictable("the block has no gate or router module")
        return gate

    def report(self) -> None:
        """Logs in one line which layers have no predictions, and why."""
        if not self._reasons:
            return
        layers: dict[str, list[int]] = {}
        for index, reason in sorted(self._reasons.items()):
            layers.setdefault(reason, []).append(index)
        text = "; ".join(f"{ranges(indices)} ({reason})" for reason, indices in layers.items())
        logger.warning("Expert cache: no predictions for MoE layers %s", text)


def ranges(numbers: Sequence[int]) -> str:
    """Formats ascending numbers as text: `0, 2 to 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _blocks_around(runners: Sequence[Any], model: torch.nn.Module) -> list[torch.nn.Module | None]:
    """Returns each runner's parent module, by search: layer names need not be module paths."""
    around = {id(child): part for part in model.modules() for child in part.children()}
    return [around.get(id(runner)) for runner in runners]


def _correction(router: Any) -> np.ndarray | None:
    bias = getattr(router, "e_score_correction_bias", None)
    return bias.detach().float().cpu().numpy() if isinstance(bias, torch.Tensor) else None
