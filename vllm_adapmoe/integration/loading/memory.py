"""Computes the memory that vLLM may use on a device, and what it needs on it in addition to experts."""

import math
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psutil
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.integration.compat import kv_cache_counting
from vllm_adapmoe.planning.slot_budget import DeviceMemory, activation_bytes


def usable_memory(config: AdapMoEConfig, vllm_config: VllmConfig) -> DeviceMemory:
    """Returns the memory that a worker may use, with nothing spent yet.

    That is the share `gpu_memory_utilization` of the device; on the CPU, each rank gets an equal part of it. With
    `kv_cache_memory_bytes` vLLM ignores that share, and an explicit slot budget does so, too.
    """
    total = current_platform.get_device_total_memory()
    if current_platform.is_cpu():
        total //= vllm_config.parallel_config.tensor_parallel_size
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is None:
        smaller = f"lower max_model_len={vllm_config.model_config.max_model_len}"
    else:
        smaller = f"lower kv_cache_memory_bytes={cache.kv_cache_memory_bytes}"
    smaller += f" or max_num_batched_tokens={vllm_config.scheduler_config.max_num_batched_tokens}"
    if cache.kv_cache_memory_bytes is not None and not config.automatic:
        return DeviceMemory(total, remedy=smaller)
    share = cache.gpu_memory_utilization
    return DeviceMemory(math.ceil(total * share), remedy=f"raise gpu_memory_utilization={share}, or {smaller}")


def step_bytes(vllm_config: VllmConfig, inner: int, top_k: int) -> int:
    """Returns `activation_bytes` of the largest step; `inner`: intermediate size of this worker's expert shard."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    speculative, dtype = vllm_config.speculative_config, cast(Any, model.dtype)
    tokens = scheduler.max_num_batched_tokens
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    return activation_bytes(
        tokens=tokens,
        logit_rows=min(tokens, scheduler.max_num_seqs * (1 + drafts)),
        hidden=model.get_hidden_size(),
        vocabulary=model.get_vocab_size(),
        inner=inner,
        top_k=top_k,
        dtype_bytes=int(dtype.itemsize),
    )


def min_kv_cache(vllm_config: VllmConfig) -> tuple[int, str]:
    """Returns the minimum bytes of KV cache that vLLM starts with, and what they are for.

    They hold one request of full length and the block that vLLM reserves, by vLLM's own count over all built layers:
    latents of MLA, sliding windows, and the state of layers without attention.
    """
    given = vllm_config.cache_config.kv_cache_memory_bytes
    if given is not None:
        return given, "kv_cache_memory_bytes"
    specs = {}
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    for name, layer in layers.items():
        if getattr(layer, "kv_sharing_target_layer_name", None) is None:
            spec = layer.get_kv_cache_spec(vllm_config)
            if spec is not None:
                specs[name] = spec
    max_memory_usage_bytes, unify_hybrid_kv_cache_specs = kv_cache_counting()
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        unify_hybrid_kv_cache_specs(specs)
    block = sum(spec.page_size_bytes for spec in specs.values())
    length = vllm_config.model_config.max_model_len
    return max_memory_usage_bytes(vllm_config, specs.values()) + block, f"one request of {length} tokens"


class ModelWatch:
    """Collects a model's parameters while it is built, because vLLM returns the model only after loading."""

    def __init__(self) -> None:
        self._resident = psutil.Process().memory_info().rss
        self._parameters: list[weakref.ref[nn.Parameter]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records every parameter registered with a module inside the context."""

        def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                self._parameters.append(weakref.ref(parameter))

        hook = register_module_parameter_registration_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def other_weights(self, experts: Collection[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters that are not in `experts`, each once."""
        known = {id(expert) for expert in experts}
        alive = {id(parameter): parameter for reference in self._parameters if (parameter := reference()) is not None}
        return [parameter for key, parameter in alive.items() if key not in known]

    @property
    def bytes(self) -> int:
        """Bytes of the recorded parameters that are still in use."""
        return sum(weight.nbytes for weight in self.other_weights(()))

    def bytes_in_use(self, weights: Collection[nn.Parameter]) -> int:
        """Returns the bytes that vLLM counts as used, without the `weights`.

        On a GPU that is everything allocated, also by other processes. On the CPU it is this process's resident memory
        before the model was built, because weights become resident as they are loaded.
        """
        if current_platform.is_cpu():
            return self._resident
        free, total = torch.cuda.mem_get_info()
        return total - free - sum(weight.nbytes for weight in weights if weight.is_cuda)
