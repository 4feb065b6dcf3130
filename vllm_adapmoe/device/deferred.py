"""DeferredRouting: routing that is kept on the device while a step runs, and read by the host afterwards."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_adapmoe.cache.host_copy import HostCopy

NOT_RECORDED = -2
"""Buffer value where a layer has not recorded its routing yet."""


class RoutingNotRecorded(RuntimeError):
    """A layer did not record its routing: the replayed CUDA graph does not contain its experts."""


@dataclass(frozen=True)
class FinishedStep:
    """Routing of a step that has run."""

    layers: list[int]
    """Layers that ran without waiting."""
    ids: np.ndarray
    """Selected experts, int32 `[all layers, tokens, top_k]`; -1: dropped, or padding."""
    costs: np.ndarray
    """Cost of what gating dropped, as in `Gated.cost`, float64 `[all layers, tokens]`."""
    payload: Any
    """The caller's object passed to `close_step`."""

    def events(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each layer that ran without waiting: its index, and its distinct experts."""
        for layer in self.layers:
            ids = self.ids[layer]
            yield layer, np.unique(ids[ids >= 0]).astype(np.int64)


class DeferredRouting:
    """Device buffers that layers write their routing into, and the copies of it in flight to the host.

    The buffers keep their addresses, so that a CUDA graph can write to them.

    Args:
        layers: number of MoE layers.
        tokens: maximum tokens of a step.
        top_k: experts per token.
        device: device of the routing.
    """

    def __init__(self, layers: int, tokens: int, top_k: int, device: torch.device) -> None:
        self.tokens = tokens
        self.ids = torch.full((layers, tokens, top_k), NOT_RECORDED, dtype=torch.int32, device=device)
        self.costs = torch.zeros((layers, tokens), dtype=torch.float64, device=device)
        self.rows = torch.zeros(1, dtype=torch.int32, device=device)
        """Rows of the step that have a token, int32 `[1]`; those behind them are padding. A graph reads it, so padding
        need not be marked."""
        self.layers: set[int] = set()
        """Layers that have recorded routing in the current step."""
        self._in_flight: deque[tuple[HostCopy, list[int], Any]] = deque()
        """Copies in flight of ids and costs, with the arguments of `close_step`."""

    def begin_step(self, rows: int) -> None:
        """Resets the buffer before a step of `rows` tokens in which every layer has to record its routing."""
        self.ids.fill_(NOT_RECORDED)
        self.rows.fill_(rows)

    def record(self, layer: int, ids: torch.Tensor, costs: torch.Tensor | None) -> None:
        """Records the routing of a layer, in a step of at most `tokens` tokens.

        Args:
            layer: MoE layer index.
            ids: selected experts, integer `[tokens, top_k]`; -1: dropped, or padding.
            costs: costs of gating, `[tokens]`; None: no gating.
        """
        self.layers.add(layer)
        self.ids[layer, : len(ids), : ids.shape[1]].copy_(ids)
        if costs is not None:
            self.costs[layer, : len(costs)].copy_(costs)

    def close_step(self, tokens: int, payload: Any, layers: list[int] | None = None) -> None:
        """Starts copying the routing of a step that has been launched to the host.

        Args:
            tokens: tokens of the step.
            payload: returned with the step.
            layers: layers whose routing is recorded; None: those that called `record`, which a replayed graph does not.
        """
        layers = sorted(self.layers) if layers is None else layers
        self.layers = set()
        if not layers:
            return
        copy = HostCopy(self.ids[:, :tokens], self.costs[:, :tokens])
        self._in_flight.append((copy, layers, payload))

    def wait(self) -> None:
        """Blocks until all steps have run."""
        if self._in_flight:
            self._in_flight[-1][0].wait()

    def finished(self) -> Iterator[FinishedStep]:
        """Yields steps that have run since the last call, oldest first, without waiting for any.

        Raises:
            RoutingNotRecorded: a layer of `layers` has not recorded its routing, so its output was wrong.
        """
        while self._in_flight and self._in_flight[0][0].arrived:
            copy, layers, payload = self._in_flight.popleft()
            ids, costs = copy.tensors
            missing_layers = [layer for layer in layers if (ids[layer, :, 0] == NOT_RECORDED).any()]
            if missing_layers:
                raise RoutingNotRecorded(
                    f"MoE layers {missing_layers} recorded no routing in a decode step: the CUDA graph lacks their "
                    "experts, so its tokens are wrong; set decode=host"
                )
            yield FinishedStep(layers, ids.numpy(), costs.numpy(), payload)
