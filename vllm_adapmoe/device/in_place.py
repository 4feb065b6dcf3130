"""Decode steps that wait for nothing: experts are read where they are, and the cache catches up behind them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.device.addresses import AddressTable
from vllm_adapmoe.device.deferred import UNSEEN, DeferredRouting

GATE_UP, DOWN = "w13_weight", "w2_weight"
"""vLLM's names of an expert's two pieces."""


class InPlaceDecode:
    """Runs steps of few tokens without the host.

    While a step is launched, nobody leaves a slot, and a table of addresses says where each expert is. Which experts
    it used is read when it has run; some of those that it read over the link are then loaded, in the place of others
    that are wanted less.

    Args:
        cache: of bf16 or float16 experts with the pieces `GATE_UP` and `DOWN`, whose store the device can read.
        top_k: experts of a token.
        device: of the slots.

    Raises:
        ValueError: the device cannot read the store.
    """

    def __init__(self, cache: ExpertCacheManager, top_k: int, device: torch.device) -> None:
        from vllm_adapmoe.device.experts_by_address import experts_by_address  # needs Triton

        self.kernel = experts_by_address
        self.cache = cache
        store = cache.store
        self.device = device
        self.follow_pools()
        self.routing = DeferredRouting(store.num_layers, MAX_TOKENS, top_k, device)
        shapes = [{piece.name: piece.shape for piece in layout.pieces} for layout in store.layouts]
        self.inner = [shape[DOWN][1] for shape in shapes]
        """Of each layer: size between the projections."""
        self.running = False
        """The step that is being launched reads in place."""

    def follow_pools(self) -> None:
        """Learns where the slots are: at first, and when the cache has been given others."""
        cache = self.cache
        self.addresses = AddressTable(cache.store, cache.pools, cache.pool_of_layer, (GATE_UP, DOWN), self.device)

    @contextmanager
    def step(self, tokens: int, about: Any) -> Iterator[None]:
        """A step of at most `MAX_TOKENS` tokens is launched within; `about` is given back with what it has used."""
        with self.cache.frozen() as slots:
            self.addresses.publish(slots)
            self.routing.begin_step()
            self.running = True
            try:
                yield
            finally:
                self.running = False
        self.routing.close_step(tokens, slots, about, list(range(len(self.inner))))

    def experts(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, costs: torch.Tensor | None
    ) -> torch.Tensor:
        """`experts_by_address` for one layer of the step; `costs` are those of gating, `[tokens]`."""
        self.routing.record(layer, ids, costs)
        return self._run(layer, x, weights, ids)

    def warm_up(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, costs: torch.Tensor | None
    ) -> torch.Tensor:
        """Compiles and loads what a step of that many tokens runs; no expert is read, and the output is zero.

        No routing is left: a graph of this in the place of a step would show.
        """
        self.routing.record(layer, torch.full_like(ids, UNSEEN), costs)
        return self._run(layer, x, weights, torch.full_like(ids, -1))

    def _run(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        gate_up, down = self.addresses.table[:, layer]
        return self.kernel(x, weights, ids, gate_up, down, self.inner[layer])
