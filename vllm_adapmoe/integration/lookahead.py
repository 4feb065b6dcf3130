"""Applies the next layers' gates to a layer's input, and records traces of what the routers and the gates say."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.prefetch.foresight import Foretold, foretell
from vllm_adapmoe.simulate.trace import Step, TraceWriter, sample_rows

if TYPE_CHECKING:
    from vllm_adapmoe.integration.layers import CachedExperts


def find_gate(model: torch.nn.Module, layer_name: str) -> torch.nn.Module | None:
    """The module that gives a layer's router logits: beside the experts, under the name that the model chose."""
    try:
        block = model.get_submodule(layer_name.rpartition(".")[0])
    except AttributeError:
        return None
    return getattr(block, "gate", None) or getattr(block, "router", None)


class GateStack:
    """The gates of the layers after one layer, as one matrix.

    Args:
        gates: modules hidden -> router logits; None where a layer's was not found.
        hidden: size of their input.
        dtype: of their input.
        device: of their weights.
    """

    def __init__(
        self, gates: list[torch.nn.Module | None], hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        weights, biases = [], []
        self.slices: list[slice | None] = []
        end = 0
        for gate in gates:
            if gate is None:
                self.slices.append(None)
                continue
            # Whatever format its weights are in: a linear map is what it does to the unit vectors.
            bias = _logits(gate, torch.zeros(1, hidden, dtype=dtype, device=device))
            weights.append(_logits(gate, torch.eye(hidden, dtype=dtype, device=device)).T - bias.T)
            biases.append(bias[0])
            self.slices.append(slice(end, end + len(bias[0])))
            end += len(bias[0])
        self.weight = torch.cat(weights).contiguous() if weights else None
        self.bias = torch.cat(biases) if biases else None

    def logits(self, x: torch.Tensor) -> np.ndarray:
        """float32 `[tokens, sum of experts]` of all gates for `x` `[tokens, hidden]`."""
        assert self.weight is not None
        return torch.nn.functional.linear(x.float(), self.weight, self.bias).cpu().numpy()


def _logits(gate: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = gate(x)
    return (output[0] if isinstance(output, tuple) else output).float()


class Lookahead:
    """Follows a worker's steps layer by layer.

    Args:
        layers: the model's MoE layers, in order.
        model: to find their gates in.
        routers: of each layer.
        cache: told of every routing and prediction; None where every expert is resident.
        lookahead: later layers to look at.
        trace: where steps are recorded, with every prediction; None: nowhere.
        requests: gives the ids and the computed tokens of the step's requests, and rows of each.
    """

    def __init__(
        self,
        layers: "list[CachedExperts]",
        model: torch.nn.Module,
        routers: list[Any],
        cache: ExpertCacheManager | None,
        lookahead: int,
        trace: TraceWriter | None,
        requests: Callable[[], list[tuple[str, int, int]]],
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.trace = trace
        self.requests = requests
        self.lookahead = lookahead
        self.corrections = [_correction(router) for router in routers]
        self.gates = [find_gate(model, layer.layer_name) for layer in layers]
        self.stacks: list[GateStack | None] = [None] * len(layers)
        self.step: Step | None = None

    def observe(
        self, index: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor
    ) -> None:
        """One event of layer `index`: predictions from its input, for the cache and the trace.

        Args:
            index: of the layer.
            x: `[tokens, hidden]`, without padding.
            weights: `[tokens, top_k]`, after gating.
            ids: `[tokens, top_k]`, on the host.
            keep: bool of the same shape, on the host.
        """
        stack = self._stack(index, x)
        foretold: dict[int, Foretold] = {}
        if stack.weight is not None:
            logits = stack.logits(x[sample_rows(len(x))])
            for distance, columns in enumerate(stack.slices, start=1):
                if columns is not None:
                    foretold[distance] = self._foretell(index + distance, logits[:, columns])
        routing = ids.numpy().astype(np.int64, copy=False), keep.numpy()
        if self.cache is not None:
            self.cache.look_ahead(index, routing, foretold)
        if self.trace is not None:
            self._record(index, weights, *routing, foretold)

    def _stack(self, index: int, x: torch.Tensor) -> GateStack:
        stack = self.stacks[index]
        if stack is None:
            gates = self.gates[index + 1 : index + 1 + self.lookahead]
            stack = self.stacks[index] = GateStack(gates, x.shape[1], x.dtype, x.device)
        return stack

    def _foretell(self, target: int, logits: np.ndarray) -> Foretold:
        layer = self.layers[target]
        sensitivity, threshold = 0.0, 0.0
        if layer.gate is not None and layer.gate.plan.rule == "token":
            sensitivity, threshold = layer.gate.sensitivity, layer.gate.plan.threshold
        return foretell(logits, layer.top_k, sensitivity, threshold, self.corrections[target])

    def _record(
        self,
        index: int,
        weights: torch.Tensor,
        ids: np.ndarray,
        keep: np.ndarray,
        foretold: dict[int, Foretold],
    ) -> None:
        if index == 0:
            requests = self.requests()
            self.step = Step(
                seconds=time.monotonic(),
                requests=[name for name, _, rows in requests for _ in range(rows)],
                positions=np.concatenate([np.arange(start, start + rows) for _, start, rows in requests]),
                ids=np.zeros((len(self.layers), *ids.shape), dtype=np.int64),
                weights=np.zeros((len(self.layers), *ids.shape), dtype=np.float16),
                foretold={},
            )
        step, trace = self.step, self.trace
        if step is None or trace is None or step.ids.shape[1:] != ids.shape:
            return
        step.ids[index] = ids
        # A kept weight is never zero, or the expert would count as dropped.
        step.weights[index] = np.where(keep, np.maximum(weights.cpu().numpy(), 1e-6), 0)
        step.foretold.update({(index, distance): one for distance, one in foretold.items()})
        if index == len(self.layers) - 1:
            trace.add(step)
            self.step = None

    def close(self) -> None:
        """Ends the trace."""
        if self.trace is not None:
            self.trace.close()


def _correction(router: Any) -> np.ndarray | None:
    bias = getattr(router, "e_score_correction_bias", None)
    return None if bias is None else bias.detach().float().cpu().numpy()
