"""Runs whole decode steps, or single layers of other steps, on a GPU without waiting for the host."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.in_place import InPlaceDecode
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.graph_break import break_graph_at, graphs_in_pieces, graphs_without_host
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts
from vllm_adapmoe.integration.loading.slot_pools import slots_device
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.integration.worker.current_step import CurrentStep, Requests
from vllm_adapmoe.integration.worker.decode_path import choose_decode
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor


class DeviceOnlySteps:
    """Decides which steps of a worker run without the host, and processes their routing afterwards.

    Args:
        layers: the model's MoE layers.
        cache: the cache of their experts; None if every expert is resident.
        in_place: reads absent experts of small steps in host memory; None: every step fetches them first.
        routing: the routing that layers record on the device.
    """

    def __init__(
        self,
        layers: Sequence[MappedExperts],
        cache: ExpertCacheManager | None,
        in_place: InPlaceDecode | None,
        routing: DeferredRouting,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.in_place = in_place
        self.routing = routing

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        vllm_config: VllmConfig,
        moe_layers: Sequence[CachedExperts],
        cache: ExpertCacheManager | None,
    ) -> Self | None:
        """Creates them as configured or measured; None on the CPU, and if the layers run vLLM's own code.

        Before vLLM captures CUDA graphs, configures what they hold: whole decode steps if these do not need the host,
        else the parts between MoE blocks.

        Raises:
            AdapMoEError: a kernel cannot work on slots, or `decode=in_place` is set where it does not work.
        """
        layers = [layer for layer in moe_layers if isinstance(layer, MappedExperts)]
        config = settings.config
        if not layers or (cache is None and settings.gating is None and config.trace_out is None):
            return None
        compilation = vllm_config.compilation_config
        for layer in layers:
            layer.use_slot_kernel()
        runners = [compilation.static_forward_context[layer.layer_name] for layer in layers]
        in_pieces = all([break_graph_at(runner) for runner in runners])
        device = slots_device()
        in_place = None if cache is None else choose_decode(config, vllm_config, layers, cache, device)
        if in_place is not None:
            graphs_without_host(compilation, in_place.routing.tokens, in_pieces)
            return cls(layers, cache, in_place, in_place.routing)
        graphs_in_pieces(compilation, in_pieces)
        top_k = max(layer.top_k for layer in layers)
        return cls(layers, cache, None, DeferredRouting(len(layers), MAX_TOKENS, top_k, device))

    @contextmanager
    def step(self, tokens: int, current: CurrentStep) -> Iterator[None]:
        """Surrounds the launch of a step of `tokens` tokens."""
        if self.in_place is not None and tokens <= self.routing.tokens and self._all_on_device():
            requests: Requests = []
            with self.in_place.step(tokens, requests):
                yield
                requests += current.requests()
            return
        self.routing.layers.clear()  # drop entries of graph capture
        yield
        if self.routing.layers:  # layers that were fully resident
            experts = max(layer.local_num_experts for layer in self.layers)
            self.routing.close_step(tokens, np.zeros((len(self.layers), experts), dtype=np.int32), None)

    def _all_on_device(self) -> bool:
        """Returns whether nothing on the host needs the routing while the step runs."""
        layer = self.layers[0]
        return layer.probe is None and (layer.gating is None or not layer.gating.needs_residency)

    def drain_finished(self, predictor: ExpertPredictor | None) -> None:
        """Passes the routing of finished steps to cache, gates and `predictor`, without waiting for other steps."""
        for step in self.routing.finished():
            if self.cache is not None:
                self.cache.record_in_place(list(step.events()))
            for index in step.layers:
                gate = self.layers[index].gating
                if gate is not None:
                    gate.count(torch.from_numpy(step.ids[index] >= 0), torch.from_numpy(step.costs[index]), None)
            if step.payload and predictor is not None:
                predictor.record_in_place(step.payload, step.ids)
