"""What vLLM's compile cache has to know of a model beside its configuration."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts

KEY = "adapmoe_traced"


def note_what_is_traced(
    vllm_config: VllmConfig, model: torch.nn.Module, layers: Sequence[CachedExperts], split: bool
) -> None:
    """Writes into the configuration what `torch.compile` will see of the MoE blocks, which its other keys do not tell.

    The same settings can leave memory for every expert at one start and not at the next. Where all are resident and
    nothing is gated, vLLM's own operation is traced, or not split off, and an artefact of that would be loaded for
    layers whose weights are slots. `VllmConfig.compute_hash` takes in `additional_config`, and is asked when the model
    is first called (`vllm/compilation/decorators.py`, `aot_compile_hash_factors`, and `backends.py`): after this.

    Args:
        vllm_config: of this worker.
        model: its compiled parts hold on to the configuration they were built with: a copy, in a part of another model.
        layers: the model's MoE layers, with their caches and gates.
        split: their blocks are split off from CUDA graphs.
    """
    traced = {"own": [index for index, layer in enumerate(layers) if not layer.is_stock], "split": split}
    held: list[Any] = [getattr(module, "vllm_config", None) for module in model.modules()]
    for config in [vllm_config, *(one for one in held if isinstance(one, VllmConfig))]:
        assert isinstance(config.additional_config, dict)
        config.additional_config[KEY] = traced
