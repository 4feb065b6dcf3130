"""Extends the key of vLLM's compile cache by how the MoE blocks are traced."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts

KEY = "adapmoe_traced"


def record_traced_layers(
    vllm_config: VllmConfig, model: torch.nn.Module, layers: Sequence[CachedExperts], split: bool
) -> None:
    """Records in the configuration how `torch.compile` will trace the MoE blocks, so that it enters the cache key.

    With the same settings, every expert may fit at one start and not at the next. If all are resident and nothing is
    gated, vLLM's own operation is traced, or not split off, and that artefact must not be loaded for layers whose
    weights are slots. Gating by token is traced with the model, gating by batch is not. `VllmConfig.compute_hash`
    includes `additional_config` and is called after this, when the model is first called
    (`vllm/compilation/decorators.py`, `aot_compile_hash_factors`, and `backends.py`).

    Args:
        vllm_config: this worker's configuration.
        model: the built model; compiled submodules keep the configuration they were built with, which may be a copy.
        layers: the model's MoE layers, with caches and gates set.
        split: whether MoE blocks are split off from CUDA graphs.
    """
    traced = {
        "own": [index for index, layer in enumerate(layers) if not layer.is_stock],
        "gated": [index for index, layer in enumerate(layers) if layer.gates_in_model],
        "split": split,
    }
    of_modules: list[Any] = [getattr(module, "vllm_config", None) for module in model.modules()]
    for config in (vllm_config, *of_modules):
        if not isinstance(config, VllmConfig):
            continue
        assert isinstance(config.additional_config, dict)
        config.additional_config[KEY] = traced
