"""InPlaceDecode: decode steps that read missing experts from host memory; the cache loads some of them afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.device.addresses import AddressTable
from vllm_adapmoe.device.deferred import NOT_RECORDED, DeferredRouting

GATE_UP, DOWN = "w13_weight", "w2_weight"
"""vLLM's names of an expert's two weight tensors."""


class InPlaceDecode:
    """Runs steps of few tokens without waiting for the host.

    While a step is launched, no expert is evicted, and a table holds the address of each expert. The routing is read
    when the step has run; some of the experts that it read over the link are then loaded, and evict experts with lower
    scores.

    Args:
        cache: cache of bf16 or float16 experts with the pieces `GATE_UP` and `DOWN`, whose store the device can read.
        top_k: experts per token.
        device: device of the slots.

    Raises:
        ValueError: the device cannot read the store.
    """

    def __init__(self, cache: ExpertCacheManager, top_k: int, device: torch.device) -> None:
        from vllm_adapmoe.device.experts_by_address import experts_by_address  # needs Triton

        self.kernel = experts_by_address
        self.cache = cache
        store = cache.store
        self.device = device
        self.rebuild_addresses()
        self.routing = DeferredRouting(store.num_layers, MAX_TOKENS, top_k, device)
        shapes = [{piece.name: piece.shape for piece in layout.pieces} for layout in store.layouts]
        self.inner = [shape[DOWN][1] for shape in shapes]
        """Intermediate size of each layer's experts."""
        self.running = False
        """Whether an in-place step is being launched."""

    def rebuild_addresses(self) -> None:
        """Rebuilds the address table: at the start, and after the cache's pools were replaced."""
        cache = self.cache
        self.addresses = AddressTable(cache.store, cache.pools, cache.pool_of_layer, (GATE_UP, DOWN), self.device)

    @contextmanager
    def step(self, tokens: int, payload: Any) -> Iterator[None]:
        """Opens a context to launch a step of at most `MAX_TOKENS` tokens; its routing is returned with `payload`."""
        with self.cache.frozen() as slots:
            self.addresses.publish(slots)
            self.routing.begin_step()
            self.running = True
            try:
                yield
            finally:
                self.running = False
        self.routing.close_step(tokens, slots, payload, list(range(len(self.inner))))

    def experts(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, costs: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs one layer of the step with `experts_by_address`; `costs` are those of gating, `[tokens]`."""
        self.routing.record(layer, ids, costs)
        return self._run(layer, x, weights, ids)

    def warm_up(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, costs: torch.Tensor | None
    ) -> torch.Tensor:
        """Compiles and loads the kernels of a step of this many tokens; reads no expert, and the output is zero.

        Records no routing, so that a graph of this replayed instead of a step raises `RoutingNotRecorded`.
        """
        self.routing.record(layer, torch.full_like(ids, NOT_RECORDED), costs)
        return self._run(layer, x, weights, torch.full_like(ids, -1))

    def _run(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        gate_up, down = self.addresses.table[:, layer]
        return self.kernel(x, weights, ids, gate_up, down, self.inner[layer])
