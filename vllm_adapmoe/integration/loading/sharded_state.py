"""Saves a model whose experts are in slots as vLLM's sharded state, reading experts from the store layer by layer."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader import ShardedStateLoader

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.store.base import ExpertStore

PATTERN = "model-rank-{rank}-part-{part}.safetensors"
"""vLLM's file name pattern, for one pipeline stage."""


class PartNames(str):
    """A file name pattern that continues numbering parts over several calls of vLLM's `save_model`."""

    parts = 0

    def format(self, *args: object, **fields: object) -> str:
        """Returns the name of the next part; ignores vLLM's part number, which restarts at 0 in every call."""
        name = super().format(*args, **(fields | {"part": self.parts}))
        self.parts += 1
        return name


def save_sharded_state(
    model: nn.Module,
    cache: ExpertCacheManager,
    records: ExpertStore,
    path: str,
    pattern: str | None,
    max_size: int | None,
) -> None:
    """Saves the same tensors as `ShardedStateLoader.save_model`, with one or more separate files per MoE layer.

    Args:
        model: vLLM's model.
        cache: the cache of its experts.
        records: the cache's store, with this rank's numbering of records.
        path: folder to write to.
        pattern: pattern of file names; None: vLLM's.
        max_size: maximum bytes of a file, exceeded only by longer single tensors; None: no limit.
    """
    names = PartNames(PATTERN if pattern is None else pattern)
    slots = {tensor.untyped_storage().data_ptr() for pool in cache.pools for tensor in pool.tensors.values()}
    other_tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.untyped_storage().data_ptr() not in slots
    }  # fmt: skip
    _save(other_tensors, path, names, max_size)
    for prefix, module in model.named_modules():
        if isinstance(module, CachedExperts):
            state = module.state_dict()
            experts = read_layer(records, module.cache_layer)
            _save({f"{prefix}.{name}": t for name, t in experts.items() if name in state}, path, names, max_size)


def _save(tensors: dict[str, torch.Tensor], path: str, names: PartNames, max_size: int | None) -> None:
    part: Any = SimpleNamespace(state_dict=lambda: tensors)
    ShardedStateLoader.save_model(part, path, names, max_size)


def read_layer(records: ExpertStore, layer: int) -> dict[str, torch.Tensor]:
    """Reads all experts of a layer in the kernel's format: one tensor `[experts, ...]` per piece, in host memory."""
    layout, experts = records.layouts[layer], records.num_experts(layer)
    tensors = {piece.name: torch.empty((experts, *piece.shape), dtype=piece.dtype) for piece in layout.pieces}
    for expert in range(experts):
        records.read((layer, expert), [tensor[expert] for tensor in tensors.values()])
    return tensors
