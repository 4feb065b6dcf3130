"""Routing that nobody waited for: kept on the device while a step runs, and taken in when it has."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_adapmoe.cache.host_copy import HostCopy

UNSEEN = -2
"""In a buffer, where no layer has written yet."""


class RoutingUnseen(RuntimeError):
    """A layer has run without leaving its routing: the CUDA graph that was replayed does not hold what it should."""


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
        self.ids = torch.full((layers, tokens, top_k), UNSEEN, dtype=torch.int32, device=device)
        self.costs = torch.zeros((layers, tokens), dtype=torch.float64, device=device)
        self.layers: set[int] = set()
        """That have written in the step under way."""
        self._flights: deque[tuple[HostCopy, list[int], np.ndarray, Any]] = deque()
        """Copies of ids and costs, and what `close_step` was told."""

    def begin_step(self) -> None:
        """A step is about to be launched in which every layer has to write."""
        self.ids.fill_(UNSEEN)

    def record(self, layer: int, ids: torch.Tensor, costs: torch.Tensor | None) -> None:
        """A layer has chosen, in a step of at most `tokens`.

        Args:
            layer: MoE layer index.
            ids: integer `[tokens, top_k]`; -1: dropped, or padding.
            costs: `[tokens]`, of gating; None: nothing is gated.
        """
        self.layers.add(layer)
        self.ids[layer, : len(ids), : ids.shape[1]].copy_(ids)
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
        copy = HostCopy(self.ids[:, :tokens], self.costs[:, :tokens])
        self._flights.append((copy, layers, slots, about))

    def finished(self) -> Iterator[PassedStep]:
        """Steps that have run and were not taken in yet, the oldest first. Waits for none.

        Raises:
            RoutingUnseen: a layer of `layers` has not written: its output was not that of its experts.
        """
        while self._flights and self._flights[0][0].arrived:
            copy, layers, slots, about = self._flights.popleft()
            ids, costs = copy.tensors
            unseen = [layer for layer in layers if (ids[layer, :, 0] == UNSEEN).any()]
            if unseen:
                raise RoutingUnseen(
                    f"MoE layers {unseen} left no routing in a decode step: the CUDA graph does not hold their "
                    "experts, and its tokens are wrong; set decode=fetch"
                )
            yield PassedStep(layers, ids.numpy(), costs.numpy(), slots, about)
