"""Looks at the layers of a serving engine while calibration data runs through it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from vllm_adapmoe.gating.rules import keep_most, settle
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.policy.prediction import predict_experts
from vllm_adapmoe.profile import statistics
from vllm_adapmoe.profile.next_token import HeadFit
from vllm_adapmoe.profile.statistics import LOOKAHEAD, Sums, half

if TYPE_CHECKING:
    from vllm_adapmoe.integration.layers.cached_experts import CachedExperts


class RoutingProbe:
    """Records the routing of every layer of a worker, or disturbs one layer.

    Args:
        layers: the model's MoE layers, in order.
        model: to find their gates in.
        runners: by layer name, vLLM's MoE runner of each.
    """

    def __init__(self, layers: "list[CachedExperts]", model: torch.nn.Module, runners: dict[str, Any]) -> None:
        self.layers = layers
        self.recording = True
        self.disturbed: int | None = None
        self.step = 0.0
        self.sums: list[Sums] = [{} for _ in layers]
        self.predicted: dict[tuple[int, int], torch.Tensor] = {}
        """(layer, lookahead) -> ids `[tokens, top_k]`, of the step under way."""
        self.fits: dict[int, HeadFit] = {}
        """Next-token heads under way, by layer; -1: the first layer's, from the end of the model."""
        self._first_used: tuple[torch.Tensor, torch.Tensor] | None = None
        model.register_forward_hook(lambda module, inputs, output: self._fit_first(output))
        device = next(model.parameters()).device
        self.routers = Routers(layers, model, runners)
        with torch.inference_mode():
            dtypes = [layer.moe_config.in_dtype for layer in layers]
            self.gates = [self.routers.linear(index, dtype, device) for index, dtype in enumerate(dtypes)]
        self.routers.report()
        for index, layer in enumerate(layers):
            layer.probe = LayerProbe(self, index)

    def read(self) -> list[Sums]:
        """Sums of each layer since the last reading."""
        sums, self.sums = self.sums, [{} for _ in self.layers]
        return sums

    def fit_heads(self, layers: list[int]) -> None:
        """Sums up for the next-token heads of `layers` from here on, and for nothing else."""
        self.recording = False
        self.fits = {index: HeadFit(*self._shape(index)) for index in layers}

    def _shape(self, index: int) -> tuple[int, int]:
        layer = self.layers[max(index, 0)]
        return layer.hidden_size, layer.local_num_experts

    def read_heads(self) -> dict[int, np.ndarray]:
        """The heads of `fit_heads`, and an end of it."""
        fits, self.fits = self.fits, {}
        return {index: fit.solve() for index, fit in fits.items()}

    def fit(self, index: int, x: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor) -> None:
        """One step of a layer: its inputs against what their successors use.

        Args:
            index: of the layer.
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
        """Ids `[tokens, top_k]`, best first, that `layer` is predicted to choose for `x`, as when serving; None where
        its router cannot be foretold."""
        gate = self.gates[layer]
        if gate is None:
            return None
        logits = torch.addmm(gate.bias, x.float(), gate.weight).cpu().numpy()
        predicted = predict_experts(logits, self.layers[layer].top_k, correction=self.routers.corrections[layer])
        return torch.from_numpy(predicted.ids)


class LayerProbe:
    """The probe of one layer."""

    def __init__(self, probe: RoutingProbe, index: int) -> None:
        self.probe = probe
        self.index = index

    def observe(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Records one step of the layer, as far as that is wanted; returns the weights to go on with.

        Args:
            x: `[tokens, hidden]`.
            weights: `[tokens, top_k]`, float32.
            ids: `[tokens, top_k]`, on the host.
            real: bool `[tokens]`, False for padding; None: all are real.
        """
        probe, layer = self.probe, self.probe.layers[self.index]
        if probe.recording:
            rows = slice(None) if real is None else real
            self._record(layer, x[rows], weights[rows], ids[rows], _sequence_starts(len(ids))[rows])
        if probe.fits:
            rows = slice(None) if real is None else real
            probe.fit(self.index, x[rows], ids[rows], _sequence_starts(len(ids))[rows])
        if probe.disturbed != self.index:
            return weights
        counts = torch.full((len(ids),), half(ids.shape[1]), device=weights.device)
        return weights + probe.step * (settle(weights, keep_most(weights, counts)).weights - weights)

    def _record(
        self, layer: "CachedExperts", x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor
    ) -> None:
        probe, experts = self.probe, layer.local_num_experts
        sums = probe.sums[self.index]
        statistics.add(sums, statistics.routing_sums(weights.cpu(), ids, starts, experts))
        for pair_ids, outputs in layer.expert_outputs(x, ids):
            statistics.add(sums, statistics.norm_sums(outputs, pair_ids, experts))
        for distance in range(1, LOOKAHEAD + 1):
            predicted = probe.predicted.pop((self.index - distance, distance), None)
            if predicted is not None:
                statistics.add(probe.sums[self.index - distance], statistics.prediction_sums(predicted, ids, distance))
            if self.index + distance < len(probe.layers):
                predicted = probe.predict_experts(self.index + distance, x)
                if predicted is not None:
                    probe.predicted[self.index, distance] = predicted


def _sequence_starts(tokens: int) -> torch.Tensor:
    """Bool `[tokens]`, True where a request's rows begin in the step under way."""
    metadata: Any = get_forward_context().attn_metadata
    metadata = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
    starts = torch.zeros(tokens + 1, dtype=torch.bool)
    starts[metadata.query_start_loc.cpu().long()] = True
    return starts[:tokens]


def plain(sums: list[Sums]) -> list[dict[str, list]]:
    """For the way between processes."""
    return [{key: np.asarray(value).tolist() for key, value in layer.items()} for layer in sums]
