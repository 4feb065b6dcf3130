"""Estimates the memory of a worker's CUDA graphs and of the cache's tables, before the model is loaded."""

from collections.abc import Sequence
from typing import Any, cast

from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.planning.graph_memory import CapturedGraphs, bookkeeping_bytes, graph_bytes
from vllm_adapmoe.planning.slot_budget import token_bytes
from vllm_adapmoe.simulate.trace import layers_ahead


def graphs_of_worker(
    settings: EngineSettings, vllm_config: VllmConfig, layers: Sequence[CachedExperts], inner: int, resident: bool
) -> tuple[int, str]:
    """Returns the maximum bytes of CUDA graphs, and a description of them; 0 with enforce_eager and on the CPU.

    Args:
        settings: the engine's settings of the method.
        vllm_config: resolved by vLLM, with the graphs' mode and sizes.
        layers: the model's MoE layers.
        inner: intermediate size of this worker's part of an expert.
        resident: whether every expert has a slot.
    """
    attention = get_layers_from_vllm_config(vllm_config, cast(Any, AttentionLayerBase))
    model, dtype = vllm_config.model_config, cast(Any, vllm_config.model_config.dtype)
    hidden, nbytes = model.get_hidden_size(), int(dtype.itemsize)
    max_bytes, description = 0, ""
    for graphs in captured_graphs(settings, vllm_config, len(layers), len(attention), resident):
        top_k = max(layer.top_k for layer in layers)
        needed = graph_bytes(graphs, row_bytes=hidden * nbytes, pair_bytes=token_bytes(hidden, inner, top_k, nbytes))
        if needed > max_bytes:
            max_bytes, description = needed, str(graphs)
    return max_bytes, description


def captured_graphs(
    settings: EngineSettings, vllm_config: VllmConfig, moe_layers: int, attention_layers: int, resident: bool
) -> list[CapturedGraphs]:
    """Returns the sets of graphs that may be captured; `GpuSteps.of` decides after the model is loaded.

    Sizes of full decode graphs are those of at most `max_num_seqs` requests, as in vLLM's `_init_candidates`
    (`v1/worker/gpu/cudagraph_utils.py`) and `initialize_cudagraph_keys` (`v1/cudagraph_dispatcher.py`).
    """
    compilation = vllm_config.compilation_config
    mode, sizes = compilation.cudagraph_mode, [*(compilation.cudagraph_capture_sizes or ())]
    if mode is None or mode == CUDAGraphMode.NONE or not sizes:
        return []
    speculative = vllm_config.speculative_config
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    decodes = vllm_config.scheduler_config.max_num_seqs * (1 + drafts)
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)

    def of(mode: CUDAGraphMode, sizes: list[int], splits: int) -> CapturedGraphs:
        in_pieces = sizes if mode.has_piecewise_cudagraphs() else []
        whole = [size for size in sizes if mode == CUDAGraphMode.FULL or size <= decodes]
        whole = whole if mode.has_full_cudagraphs() else []
        return CapturedGraphs(in_pieces, splits + 1 if in_pieces else 0, whole, layers)

    if resident and settings.gating is None:
        return [of(mode, sizes, attention_layers)]  # vLLM's own blocks: no graph is split at them
    splits = attention_layers + moe_layers
    pieces = mode == CUDAGraphMode.FULL or mode.has_piecewise_cudagraphs()
    choices = [of(CUDAGraphMode.PIECEWISE, sizes, splits)] if pieces else []
    if not resident and settings.config.decode != "host":
        small = [size for size in sizes if size <= MAX_TOKENS] if mode.has_full_cudagraphs() else sizes
        whole_steps = CUDAGraphMode.FULL_AND_PIECEWISE if mode == CUDAGraphMode.FULL else mode
        choices.append(of(whole_steps, small, splits))
    return choices


def bookkeeping_of_worker(
    settings: EngineSettings, vllm_config: VllmConfig, layers: Sequence[CachedExperts], resident: bool
) -> int:
    """Returns the bytes of gates, tables and buffers that the worker will allocate for these layers."""
    config, has_heads = settings.config, settings.heads is not None
    prefetch, tracing = config.prefetch, config.trace_out is not None
    prefetching = not resident and prefetch.lookahead > 0 and prefetch.max_experts > 0
    follows = tracing or prefetching or has_heads or (not resident and config.scheduler.enabled)
    ahead = layers_ahead(prefetch, tracing) if follows else 0
    on_gpu = not current_platform.is_cpu() and not (resident and settings.gating is None)
    return bookkeeping_bytes(
        layers=len(layers),
        experts=max(layer.local_num_experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        hidden=vllm_config.model_config.get_hidden_size(),
        tokens=MAX_TOKENS if on_gpu else 0,
        gates_ahead=ahead,
        heads=has_heads and follows,
        first_head=has_heads and (tracing or (prefetching and prefetch.first_layer)),
        traced=tracing,
    )
