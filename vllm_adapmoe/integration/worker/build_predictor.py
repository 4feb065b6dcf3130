"""Builds a worker's `ExpertPredictor` as the configuration needs it: for prefetch, eviction or a trace."""

from collections.abc import Sequence
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.worker.current_step import CurrentStep
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.integration.worker.step_recorder import StepRecorder
from vllm_adapmoe.prefetch.heads import NextTokenHeads
from vllm_adapmoe.prefetch.request_experts import RequestExperts
from vllm_adapmoe.simulate.trace import TraceInfo, TraceWriter, layers_ahead


def build_predictor(
    config: AdapMoEConfig,
    vllm_config: VllmConfig,
    model: torch.nn.Module,
    layers: Sequence[CachedExperts],
    cache: ExpertCacheManager | None,
    next_token_heads: NextTokenHeads | None,
    current: CurrentStep,
) -> ExpertPredictor | None:
    """Returns the predictor of a worker; None if nothing needs predictions and no trace is recorded.

    Args:
        config: the method's configuration.
        vllm_config: this worker's configuration.
        model: the model that contains the layers' routers.
        layers: the model's MoE layers, in order.
        cache: the cache of their experts; None if every expert is resident.
        next_token_heads: heads of the profile; None: it has none, or there is no profile.
        current: the worker's current step.
    """
    prefetching = cache is not None and cache.controller.planner is not None
    recorder = _recorder(config, vllm_config, layers, cache)
    ahead = layers_ahead(config.prefetch, recorder is not None)
    request_experts = None
    if cache is not None and prefetching:
        shape = cache.controller.shape
        request_experts = RequestExperts(min(ahead, len(shape.num_experts)), max(shape.num_experts))
    heads = first = None
    if next_token_heads is not None:
        by_next_token = cache is not None and config.eviction in ("auto", "next_token")
        if recorder is not None or request_experts is not None or by_next_token:
            heads = next_token_heads.layers
        if recorder is not None or (prefetching and config.prefetch.first_layer):
            first = next_token_heads.first
    if request_experts is None and recorder is None and heads is None:
        return None
    return ExpertPredictor(
        layers,
        Routers(layers, model, vllm_config.compilation_config.static_forward_context),
        cache if prefetching else None,
        ahead,
        heads,
        first,
        request_experts,
        recorder,
        current,
    )


def _recorder(
    config: AdapMoEConfig, vllm_config: VllmConfig, layers: Sequence[CachedExperts], cache: ExpertCacheManager | None
) -> StepRecorder | None:
    """Starts the trace that `trace_out` asks for, on the first rank; None on other ranks or without it."""
    if config.trace_out is None or get_tensor_model_parallel_rank() != 0:
        return None
    if cache is not None:
        shape = cache.controller.shape
    else:
        experts = [layer.local_num_experts for layer in layers]
        shape = CacheShape(experts, max(layer.top_k for layer in layers), [0] * len(experts), [0] * len(experts))
    info = TraceInfo(
        model=vllm_config.model_config.model,
        num_experts=list(shape.num_experts),
        top_k=shape.top_k,
        lookahead=layers_ahead(config.prefetch, tracing=True),
        expert_bytes=list(shape.expert_bytes),
        pool_of=list(shape.pool_of),
    )
    trace = TraceWriter(Path(config.trace_out), info, config.trace_mib << 20)
    return StepRecorder(trace, len(layers), shape.top_k)
