"""Records or perturbs the routing of a serving engine's layers while calibration data runs through it."""

from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from vllm_adapmoe.gating.rules import largest_mask, rescale_kept
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.policy.prediction import predict_experts
from vllm_adapmoe.profile import statistics
from vllm_adapmoe.profile.next_token import HeadFit
from vllm_adapmoe.profile.statistics import LOOKAHEAD, Sums, half


class RoutingProbe:
    """Records the routing of every layer of a worker, or perturbs one layer.

    Args:
        layers: the model's MoE layers, in order.
        model: the model that contains their routers.
        runners: vLLM's MoE runners, by layer name.
    """

    def __init__(self, layers: list[CachedExperts], model: torch.nn.Module, runners: dict[str, Any]) -> None:
        self.layers = layers
        self.recording = True
        self.perturbed: int | None = None
        self.step = 0.0
        self.sums: list[Sums] = [{} for _ in layers]
        self.predicted: dict[tuple[int, int], torch.Tensor] = {}
        """Predicted ids `[tokens, top_k]` of the current step, by (layer, lookahead)."""
        self.fits: dict[int, HeadFit] = {}
        """Next-token heads being fitted, by layer; -1: the first layer's, from the model's last hidden states."""
        self._first_used: tuple[torch.Tensor, torch.Tensor] | None = None
        model.register_forward_hook(lambda module, inputs, output: self._fit_first(output))
        device = next(model.parameters()).device
        self.routers = Routers(layers, model, runners)
        with torch.inference_mode():
            dtypes = [layer.moe_config.in_dtype for layer in layers]
            self.gates = [self.routers.linear(index, dtype, device) for index, dtype in enumerate(dtypes)]
        self.routers.report()
        self.of_layers = [LayerProbe(self, index) for index in range(len(layers))]

    def read(self) -> list[Sums]:
        """Returns the sums of each layer since the last call."""
        sums, self.sums = self.sums, [{} for _ in self.layers]
        return sums

    def fit_heads(self, layers: list[int]) -> None:
        """Starts to fit the next-token heads of `layers`, and stops recording."""
        self.recording = False
        self.fits = {index: HeadFit(*self._shape(index)) for index in layers}

    def _shape(self, index: int) -> tuple[int, int]:
        layer = self.layers[max(index, 0)]
        return layer.hidden_size, layer.local_num_experts

    def read_heads(self) -> dict[int, np.ndarray]:
        """Returns the heads of `fit_heads`, and ends fitting."""
        fits, self.fits = self.fits, {}
        return {index: fit.solve() for index, fit in fits.items()}

    def fit(self, index: int, x: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor) -> None:
        """Adds one step of a layer to the fit: tokens' inputs, and the experts that the next tokens use.

        Args:
            index: index of the layer.
            x: `[tokens, hidden]`.
            ids: `[tokens, top_k]`.
            starts: bool `[tokens]`, True where a sequence begins.
        """
        if index == 0 and -1 in self.fits:
            self._first_used = self._used(0, ids), starts
        if index in self.fits:
            self._add(index, x, self._used(index, ids), starts)

    def _used(self, index: int, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), self._shape(index)[1]).scatter_(1, ids.long(), 1)

    def _add(self, index: int, x: torch.Tensor, used: torch.Tensor, starts: torch.Tensor) -> None:
        followed = ~starts[1:]
        self.fits[index].add(x[:-1][followed.to(x.device)], used[1:][followed])

    def _fit_first(self, hidden: Any) -> None:
        if self._first_used is not None:
            used, starts = self._first_used
            self._first_used = None
            self._add(-1, hidden[: len(used)], used, starts)

    def predict_experts(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """Predicts the ids `[tokens, top_k]`, best first, that `layer` chooses for `x`, as when serving.

        None if its router cannot be predicted.
        """
        gate = self.gates[layer]
        if gate is None:
            return None
        logits = torch.addmm(gate.bias, x.float(), gate.weight).cpu().numpy()
        predicted = predict_experts(logits, self.layers[layer].top_k, correction=self.routers.corrections[layer])
        return torch.from_numpy(predicted.ids)


class LayerProbe:
    """Part of a `RoutingProbe` that observes one layer."""

    def __init__(self, probe: RoutingProbe, index: int) -> None:
        self.probe = probe
        self.index = index

    def observe(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Records one step of the layer if enabled; returns the weights to use, perturbed or not.

        Args:
            x: `[tokens, hidden]`.
            weights: `[tokens, top_k]`, float32.
            ids: `[tokens, top_k]`, on the host.
            real: bool `[tokens]`, False for padding; None: all are real.
        """
        probe, layer = self.probe, self.probe.layers[self.index]
        if probe.recording:
            rows = slice(None) if real is None else real
            self._record(layer, x[rows], weights[rows], ids[rows])
        if probe.fits:
            rows = slice(None) if real is None else real
            probe.fit(self.index, x[rows], ids[rows], _sequence_starts(len(ids))[rows])
        if probe.perturbed != self.index:
            return weights
        counts = torch.full((len(ids),), half(ids.shape[1]), device=weights.device)
        return weights + probe.step * (rescale_kept(weights, largest_mask(weights, counts)).weights - weights)

    def _record(self, layer: CachedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        probe = self.probe
        statistics.add(probe.sums[self.index], statistics.routing_sums(weights.cpu(), ids, layer.local_num_experts))
        for distance in range(1, LOOKAHEAD + 1):
            predicted = probe.predicted.pop((self.index - distance, distance), None)
            if predicted is not None:
                statistics.add(probe.sums[self.index - distance], statistics.prediction_sums(predicted, ids, distance))
            if self.index + distance < len(probe.layers):
                predicted = probe.predict_experts(self.index + distance, x)
                if predicted is not None:
                    probe.predicted[self.index, distance] = predicted


def _sequence_starts(tokens: int) -> torch.Tensor:
    """Returns bool `[tokens]`, True where a request's rows begin in the current step."""
    metadata: Any = get_forward_context().attn_metadata
    metadata = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
    starts = torch.zeros(tokens + 1, dtype=torch.bool)
    starts[metadata.query_start_loc.cpu().long()] = True
    return starts[:tokens]


def plain(sums: list[Sums]) -> list[dict[str, list]]:
    """Converts sums to plain lists, to send them between processes."""
    return [{key: np.asarray(value).tolist() for key, value in layer.items()} for layer in sums]
