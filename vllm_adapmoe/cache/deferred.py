"""Routing that nobody waited for: kept on the device while a step runs, and taken in when it has."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class PassedStep:
    """What layers chose in a step that has run."""

    layers: list[int]
    """Those that did not wait."""
    ids: np.ndarray
    """int32 `[all layers, tokens, top_k]`; -1: dropped, or padding."""
    costs: np.ndarray
    """float64 `[all layers, tokens]`: what gating dropped, as in `Gated.cost`."""
    slots: np.ndarray
    """int32 `[all layers, experts]`: where each expert was; -1: not in a slot."""
    about: Any
    """What `close_step` was told."""

    def events(self) -> Iterator[tuple[int, list[int], set[int]]]:
        """Of each layer that did not wait: its distinct experts, and which of them were in slots."""
        for layer in self.layers:
            ids = self.ids[layer]
            experts = np.unique(ids[ids >= 0])
            yield layer, experts.tolist(), set(experts[self.slots[layer, experts] >= 0].tolist())


@dataclass(frozen=True)
class _Flight:
    ended: torch.cuda.Event | None
    layers: list[int]
    ids: torch.Tensor
    costs: torch.Tensor
    slots: np.ndarray
    about: Any


class DeferredRouting:
    """Buffers that layers write their routing into, and copies of it on their way to the host.

    The buffers keep their addresses, so that a CUDA graph can write to them.

    Args:
        layers: MoE layers.
        tokens: most of a step.
        top_k: experts of a token.
        device: of the routing.
    """

    def __init__(self, layers: int, tokens: int, top_k: int, device: torch.device) -> None:
        self.tokens = tokens
        self.ids = torch.full((layers, tokens, top_k), -1, dtype=torch.int32, device=device)
        self.costs = torch.zeros((layers, tokens), dtype=torch.float64, device=device)
        self.layers: set[int] = set()
        """That have written in the step under way."""
        self._flights: deque[_Flight] = deque()

    def record(self, layer: int, ids: torch.Tensor, costs: torch.Tensor | None) -> None:
        """A layer has chosen, in a step of at most `tokens`.

        Args:
            layer: MoE layer index.
            ids: integer `[tokens, top_k]`; -1: dropped, or padding.
            costs: `[tokens]`, of gating; None: nothing is gated.
        """
        self.layers.add(layer)
        self.ids[layer, : len(ids)].copy_(ids)
        if costs is not None:
            self.costs[layer, : len(costs)].copy_(costs)

    def close_step(self, tokens: int, slots: np.ndarray, about: Any, layers: list[int] | None = None) -> None:
        """The step has been launched.

        Args:
            tokens: of the step.
            slots: int32 `[layers, experts]`, as the step found them.
            about: given back with it.
            layers: that have written; None: those that called `record`, which a graph that is replayed does not.
        """
        layers = sorted(self.layers) if layers is None else layers
        self.layers = set()
        if not layers:
            return
        ids, costs = self.ids[:, :tokens], self.costs[:, :tokens]
        ended = None
        if self.ids.is_cuda:
            host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in (ids, costs)]
            ids, costs = host[0].copy_(ids, non_blocking=True), host[1].copy_(costs, non_blocking=True)
            ended = torch.cuda.Event()
            ended.record()
        else:
            ids, costs = ids.clone(), costs.clone()
        self._flights.append(_Flight(ended, layers, ids, costs, slots, about))

    def finished(self) -> Iterator[PassedStep]:
        """Steps that have run and were not taken in yet, the oldest first. Waits for none."""
        while self._flights and ((ended := self._flights[0].ended) is None or ended.query()):
            flight = self._flights.popleft()
            yield PassedStep(flight.layers, flight.ids.numpy(), flight.costs.numpy(), flight.slots, flight.about)
