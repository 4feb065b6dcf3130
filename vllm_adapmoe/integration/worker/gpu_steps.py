"""Runs whole decode steps, or single layers of other steps, on a GPU without waiting for the host."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Self

import torch
from vllm.config import CompilationConfig, VllmConfig

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.gates import Gating
from vllm_adapmoe.integration.layers.graph_break import break_graph_at, graphs_in_pieces, graphs_without_host
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts
from vllm_adapmoe.integration.loading.slot_pools import slots_device
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.integration.worker.current_step import CurrentStep, LaunchedStep
from vllm_adapmoe.integration.worker.decode_path import choose_decode
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor


class GpuSteps:
    """Decides which steps of a worker run without the host, and processes their routing afterwards.

    Args:
        layers: the model's MoE layers.
        cache: the cache of their experts; None if every expert is resident.
        decode: decides on the GPU in small steps; None: the host decides in every step.
        routing: the routing that layers record on the device.
    """

    def __init__(
        self,
        layers: Sequence[MappedExperts],
        cache: ExpertCacheManager | None,
        decode: DeviceDecode | None,
        routing: DeferredRouting,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.decode = decode
        self.routing = routing

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        vllm_config: VllmConfig,
        moe_layers: Sequence[CachedExperts],
        cache: ExpertCacheManager | None,
    ) -> Self | None:
        """Creates them as configured; None on the CPU, and if the layers run vLLM's own code.

        Before vLLM captures CUDA graphs, configures what they hold: whole decode steps if these do not need the host,
        else the parts between MoE blocks.

        Raises:
            AdapMoEError: a kernel cannot work on slots, or `decode=device` is set where it does not work.
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
        decode = None if cache is None else choose_decode(config, vllm_config, layers, cache, device)
        if decode is not None:
            decode.max_tokens = graphs_without_host(compilation, decode.max_tokens, in_pieces)
            return cls(layers, cache, decode, decode.routing)
        graphs_in_pieces(compilation, in_pieces)
        top_k = max(layer.top_k for layer in layers)
        return cls(layers, cache, None, DeferredRouting(len(layers), MAX_TOKENS, top_k, device))

    def rebuild(self, compilation: CompilationConfig) -> None:
        """Follows pools whose slots were replaced, before CUDA graphs are captured for serving.

        Raises:
            AdapMoEError: too few slots are left for the GPU to decide.
        """
        if self.decode is None:
            return
        self.decode.rebuild()
        self.decode.max_tokens = graphs_without_host(compilation, self.decode.max_tokens)
        if not self.decode.max_tokens:
            raise AdapMoEError(
                "the slots left beside the KV cache are too few for decode=device, which needs one token's; lower "
                "max_model_len, or set decode=host"
            )

    def use_gating(self, gating: Gating | None) -> None:
        """Gates by another plan from the next step on; None: not at all."""
        if self.decode is not None:
            self.decode.use_gating(gating if gating is not None and gating.plan.rule == "batch" else None)

    def decides(self, tokens: int) -> bool:
        """Returns whether the GPU decides in a step of `tokens` tokens."""
        return self.decode is not None and tokens <= self.decode.max_tokens and self.layers[0].probe is None

    def warm_up(self) -> AbstractContextManager[None] | None:
        """Lets vLLM warm up and capture graphs on the GPU's own cache; None if the host decides."""
        return None if self.decode is None else self.decode.warm_up()

    def prepare_padding(self) -> None:
        """Prepares for a step without requests, whose graphs would load experts if the GPU decides."""
        if self.decode is not None:
            self.decode.take_for_padding()

    def prepare(self, tokens: int, predictor: ExpertPredictor | None) -> None:
        """Hands the cache to who decides in the next step, before the host prefetches or records anything."""
        if self.decode is None or not tokens:
            return
        if self.decides(tokens):
            self.decode.take()
        else:
            self.give_back()
            self.drain(predictor)

    @contextmanager
    def step(self, tokens: int, current: CurrentStep, predictor: ExpertPredictor | None) -> Iterator[None]:
        """Surrounds the launch of a step of `tokens` tokens."""
        decode = self.decode
        if decode is not None and self.decides(tokens):
            step = LaunchedStep(time.monotonic())
            with decode.step(tokens, step):
                if predictor is not None:
                    predictor.begin_on_device(step)
                yield
                step.requests = current.requests()
                if predictor is not None:
                    predictor.end_on_device(step)
                if decode.batch_gate is not None and not current.prompt_rows:
                    decode.batch_gate.end_step(self.routing.costs[:, :tokens])
            return
        self.routing.layers.clear()  # drop entries of graph capture
        yield
        if self.routing.layers:  # layers that were fully resident
            self.routing.close_step(tokens, None)

    def give_back(self) -> None:
        """Hands the cache to the host, before a step that the host decides, or a change of weights or slots."""
        if self.decode is not None:
            self.decode.give_back()

    def drain_finished(self, predictor: ExpertPredictor | None) -> None:
        """Passes the routing of finished steps to cache, gates and `predictor`, without waiting for other steps."""
        for step in self.routing.finished():
            if self.cache is not None and step.payload is None:  # a GPU that decides has counted by itself
                self.cache.record_whole(list(step.events()))
            for index in step.layers:
                gate = self.layers[index].gating
                if gate is not None:
                    gate.count_finished(torch.from_numpy(step.ids[index] >= 0), torch.from_numpy(step.costs[index]))
            if step.payload is not None and predictor is not None:
                predictor.record_finished(step.payload, step.ids)
        if self.decode is not None:
            self.decode.count()

    def drain(self, predictor: ExpertPredictor | None) -> None:
        """Waits for all steps, passes on their routing like `drain_finished`, and completes their trace."""
        self.routing.wait()
        self.drain_finished(predictor)
        if predictor is not None:
            predictor.write_all_traced()
