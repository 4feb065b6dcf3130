"""Tracks copies that a model's own loader makes directly into experts, bypassing their weight loader.

gpt-oss in bf16 does so (`GptOssModel._load_weights_other`). Its layers stream like those of other models: a layer
is moved into the store once it is complete and the loader writes elsewhere, so that at most two are in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_adapmoe.integration.layers.streamed_experts import StreamedExperts

COPY = torch.ops.aten.copy_.default


class ExpertWrites(TorchDispatchMode):
    """Tracks every copy into the layers' expert parameters while it is active.

    Args:
        layers: the built layers, with parameters on the host.
        is_packed: whether a layer's experts are in a pack already; copies are then skipped, so that their memory is
            never allocated.
    """

    def __init__(self, layers: Sequence[StreamedExperts], is_packed: Callable[[int], bool]) -> None:
        super().__init__()
        self.is_packed = is_packed
        self._places = {
            parameter.untyped_storage().data_ptr(): (layer, name)
            for layer in layers
            for name, parameter in layer.expert_parameters().items()
            if not parameter.is_meta and parameter.numel()
        }
        self._layer: StreamedExperts | None = None
        """Layer written to last."""
        self._written: dict[str, dict[tuple, int]] = {}
        """Elements copied into that layer, by parameter and part; a part written repeatedly counts once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is COPY:
            target = args[0]
            layer, name = self._places.get(target.untyped_storage().data_ptr(), (None, ""))
            # A finished layer's memory has been freed and may be reused.
            if layer is not None and layer.finished:
                layer = None
            if layer is not self._layer:
                self._finish_written_layer()
                self._layer, self._written = layer, {}
            if layer is not None:
                if self.is_packed(layer.cache_layer):
                    return target
                part = (target.storage_offset(), *target.shape)
                self._written.setdefault(name, {})[part] = target.numel()
        return func(*args, **(kwargs or {}))

    def _finish_written_layer(self) -> None:
        layer = self._layer
        # Layers that use the weight loader finish when it has counted all weights.
        if layer is None or layer.finished or layer.has_arrivals or self.is_packed(layer.cache_layer):
            return
        written = {name: sum(parts.values()) for name, parts in self._written.items()}
        if all(written.get(name, 0) >= parameter.numel() for name, parameter in layer.expert_parameters().items()):
            layer.finish_loading()
