"""Runs a decode step through every MoE layer: on demand through the cache, or in place without the host."""

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.routing import Token
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.experts_by_address import experts_by_address
from vllm_adapmoe.device.in_place import DOWN, GATE_UP, InPlaceDecode
from vllm_adapmoe.store.record import aligned_empty


class Inputs:
    """Drawn router outputs on the device: ids int32 `[tokens, layers, 1, top_k]`, -1 if dropped."""

    def __init__(self, shape: Shape, tokens: Sequence[Token], gated: bool, dtype: torch.dtype, device: Device) -> None:
        self.tokens = tokens
        self.gated = gated
        self.kept = np.stack([token.kept if gated else np.ones_like(token.kept) for token in tokens])
        ids = np.where(self.kept, np.stack([token.ids for token in tokens]), -1).astype(np.int32)
        self.ids = torch.from_numpy(ids).to(device.torch).unsqueeze(2)
        self.weights = torch.full((1, shape.top_k), 1 / shape.top_k, device=device.torch)
        self.x = torch.ones(1, shape.hidden, dtype=dtype, device=device.torch)


class OnDemand:
    """The plugin's path through the host, which reads a layer's routing, requests the experts and launches the kernel.

    Args:
        cache: the plugin's cache.
        shape: shape of the model.
        inputs: router outputs of the tokens to decode.
        device: device of the slots.
    """

    def __init__(self, cache: ExpertCacheManager, shape: Shape, inputs: Inputs, device: Device) -> None:
        self.cache, self.shape, self.inputs = cache, shape, inputs
        self.ahead = cache.controller.planner is not None  # None with too few slots for prefetch
        tensors = cache.pool(0).tensors
        self.places = np.stack(
            [
                tensors[name].data_ptr() + tensors[name][0].nbytes * np.arange(len(tensors[name]))
                for name in (GATE_UP, DOWN)
            ]
        )
        size = (shape.layers, 2, shape.experts)
        # Page-locked, so that copying a table does not wait. A layer's table is overwritten only after the host has
        # read the routing of a later layer, and so after it was copied.
        rows = aligned_empty(8 * shape.layers * 2 * shape.experts, pin=device.cuda)
        self.host_table = rows.view(torch.int64).view(size)
        self.table = torch.zeros(size, dtype=torch.int64, device=device.torch)

    def step(self, number: int) -> torch.Tensor:
        """Computes one token's output; waits only where routing and transfers require it."""
        inputs, cache = self.inputs, self.cache
        token, x = inputs.tokens[number], inputs.x
        for layer in range(self.shape.layers):
            ids = inputs.ids[number, layer]
            experts = sorted(expert for expert in ids.view(-1).tolist() if expert >= 0)  # waits for the previous layers
            acquisition = cache.begin(layer, experts)
            if self.ahead:
                self._prefetch(layer, token)
            cache.wait(acquisition)
            self.host_table[layer].numpy()[:] = self.places[:, cache.slot_maps[layer].numpy()]
            self.table[layer].copy_(self.host_table[layer], non_blocking=True)
            x = experts_by_address(x, inputs.weights, ids, self.table[layer, 0], self.table[layer, 1], self.shape.inner)
            cache.release(layer, experts)
        return x

    def _prefetch(self, layer: int, token: Token) -> None:
        kept = token.kept[layer] if self.inputs.gated else np.ones_like(token.kept[layer])
        self.cache.prefetch(
            layer,
            (token.ids[layer, None], kept[None]),
            lambda distance: token.predicted(layer + 1, self.inputs.gated) if distance == 1 else None,
        )


class InPlace:
    """The plugin's path without the host: experts are read in slots or host memory, with all layers in one graph.

    Args:
        cache: the plugin's cache, idle.
        shape: shape of the model.
        inputs: router outputs of the tokens to decode.
        device: device of the slots.
    """

    def __init__(self, cache: ExpertCacheManager, shape: Shape, inputs: Inputs, device: Device) -> None:
        self.cache, self.inputs, self.shape = cache, inputs, shape
        self.decode = InPlaceDecode(cache, shape.top_k, device.torch)
        self.ids = inputs.ids[0].clone()
        self.replay = device.capture(self._layers)

    def _layers(self) -> None:
        x = self.inputs.x
        for layer in range(self.shape.layers):
            x = self.decode.experts(layer, x, self.inputs.weights, self.ids[layer], None)
        self.output = x

    def step(self, number: int) -> torch.Tensor:
        """Computes one token's output, valid until the next step; first records the previous tokens' experts."""
        for passed in self.decode.routing.finished():
            self.cache.record_in_place(list(passed.events()))
        with self.decode.step(1, None):
            return self._run(number)

    def step_resident(self, number: int) -> torch.Tensor:
        """Computes one token as if every expert were in a slot; experts share slots, more than device caches hold."""
        size = self.shape.layers, self.shape.experts
        self.decode.addresses.publish(np.arange(np.prod(size), dtype=np.int32).reshape(size) % self.cache.num_slots)
        return self._run(number)

    def _run(self, number: int) -> torch.Tensor:
        self.ids.copy_(self.inputs.ids[number])
        self.replay()
        return self.output
