"""Runs a decode step through every MoE layer: on demand, decided by the host or by the GPU; or all resident."""

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.expert_kernel import run_experts
from benchmarks.gpu_check.routing import Token
from benchmarks.gpu_check.shapes import DOWN, GATE_UP, Shape
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.store.record import aligned_empty


class Inputs:
    """Drawn router outputs on the device.

    `ids` and `ahead`, the experts predicted for each layer, are int32 `[tokens, layers, 1, top_k]`, -1 if dropped.
    """

    def __init__(self, shape: Shape, tokens: Sequence[Token], gated: bool, dtype: torch.dtype, device: Device) -> None:
        self.tokens = tokens
        self.gated = gated
        self.kept = np.stack([token.kept if gated else np.ones_like(token.kept) for token in tokens])
        self.ids, self.ahead = (
            torch.from_numpy(np.where(self.kept, np.stack(ids), -1).astype(np.int32)).to(device.torch).unsqueeze(2)
            for ids in ([token.ids for token in tokens], [token.predicted_ids for token in tokens])
        )
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
        self.gate_up, self.down = tensors[GATE_UP], tensors[DOWN]
        size = (shape.layers, shape.experts)
        # Page-locked, so that copying a map does not wait. A layer's map is overwritten only after the host has read
        # the routing of a later layer, and so after it was copied.
        self.host_maps = aligned_empty(4 * shape.layers * shape.experts, pin=device.cuda).view(torch.int32).view(size)
        self.maps = torch.zeros(size, dtype=torch.int32, device=device.torch)

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
            self.host_maps[layer].copy_(cache.slot_maps[layer])
            self.maps[layer].copy_(self.host_maps[layer], non_blocking=True)
            x = run_experts(x, inputs.weights, ids, self.gate_up, self.down, self.maps[layer])
            cache.release(layer, experts)
        return x

    def stats(self) -> CacheStats:
        """Returns the counters of all tokens so far."""
        return self.cache.update_stats()

    def give_back(self) -> None:
        """Does nothing: the host has the cache."""

    def _prefetch(self, layer: int, token: Token) -> None:
        kept = token.kept[layer] if self.inputs.gated else np.ones_like(token.kept[layer])
        self.cache.prefetch(
            layer,
            (token.ids[layer, None], kept[None]),
            lambda distance: token.predicted(layer + 1, self.inputs.gated) if distance == 1 else None,
        )


class OnDevice:
    """The plugin's path without the host: the GPU decides what to load and copies it, with all layers in one graph.

    The GPU has the cache from here to `give_back`: the graph is captured on state that the host has handed over.

    Args:
        cache: the plugin's cache, idle.
        shape: shape of the model.
        inputs: router outputs of the tokens to decode.
        device: device of the slots.
        prefetch: whether to prefetch what is predicted for the next layer, up to `top_k` experts.
    """

    def __init__(
        self, cache: ExpertCacheManager, shape: Shape, inputs: Inputs, device: Device, prefetch: bool = False
    ) -> None:
        self.cache, self.inputs, self.shape, self.device, self.prefetch = cache, inputs, shape, device, prefetch
        self.decode = DeviceDecode(cache, shape.top_k, shape.top_k if prefetch else 0, device.torch)
        tensors = cache.pool(0).tensors
        self.gate_up, self.down = tensors[GATE_UP], tensors[DOWN]
        # Nothing is routed while the kernels are compiled, or the first token's experts would count twice.
        self.ids, self.ahead = torch.full_like(inputs.ids[0], -1), torch.full_like(inputs.ahead[0], -1)
        self.decode.take()
        self.replay = device.capture(self._layers)
        self.decode.routing.begin_step(1)

    def _layers(self) -> None:
        x, layers = self.inputs.x, self.shape.layers
        for layer in range(layers):
            ids = self.ids[layer]
            ahead = self.ahead[layer + 1] if self.prefetch and layer + 1 < layers else None
            row_of, _ = self.decode.experts(layer, Chosen(ids), Predicted(ahead=ahead))
            x = run_experts(x, self.inputs.weights, ids, self.gate_up, self.down, row_of)
        self.output = x

    def step(self, number: int) -> torch.Tensor:
        """Computes one token's output, valid until the next step; first counts the previous tokens' experts."""
        for _ in self.decode.routing.finished():
            pass  # gates and predictors would read it
        self.decode.count()
        with self.decode.step(1, None):
            return self.replay_token(number)

    def replay_token(self, number: int) -> torch.Tensor:
        """Computes one token's output without what surrounds a step: the GPU has the cache, and nothing is counted."""
        self.ids.copy_(self.inputs.ids[number])
        if self.prefetch:
            self.ahead.copy_(self.inputs.ahead[number])
        self.replay()
        return self.output

    def stats(self) -> CacheStats:
        """Returns the counters of all tokens so far."""
        self.device.synchronize()
        self.decode.count()
        return self.cache.stats

    def give_back(self) -> None:
        """Hands the cache back to the host; the next step takes it again."""
        self.decode.give_back()


class Resident:
    """The same kernels, in a graph, as if every expert were resident: nothing is decided or copied.

    Experts share slots, because there are more than a device caches. What the slots hold has no part in the time.

    Args:
        cache: the plugin's cache, whose slots are read.
        shape: shape of the model.
        inputs: router outputs of the tokens to decode.
        device: device of the slots.
    """

    def __init__(self, cache: ExpertCacheManager, shape: Shape, inputs: Inputs, device: Device) -> None:
        self.inputs = inputs
        tensors = cache.pool(0).tensors
        self.gate_up, self.down = tensors[GATE_UP], tensors[DOWN]
        slots = np.arange(shape.layers * shape.experts, dtype=np.int32) % cache.num_slots
        self.maps = torch.from_numpy(slots).view(shape.layers, shape.experts).to(device.torch)
        self.ids = inputs.ids[0].clone()
        self.replay = device.capture(self._layers)

    def _layers(self) -> None:
        x = self.inputs.x
        for ids, row_of in zip(self.ids[: len(self.maps)], self.maps, strict=True):
            x = run_experts(x, self.inputs.weights, ids, self.gate_up, self.down, row_of)
        self.output = x

    def replay_token(self, number: int) -> torch.Tensor:
        """Computes one token's output, valid until the next call."""
        self.ids.copy_(self.inputs.ids[number])
        self.replay()
        return self.output
