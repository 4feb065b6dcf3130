"""Notices what a model's own loader copies into experts, past their weight loader.

gpt-oss in bf16 does (`GptOssModel._load_weights_other`). Its layers stream like others: one is taken into the store as
soon as it is complete and the loader goes on to something else, so that no more than two are in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from vllm_adapmoe.integration.layers.streamed_experts import StreamedExperts

MAPPED_BYTES = 1 << 16
COPY = torch.ops.aten.copy_.default


class ExpertWrites(TorchDispatchMode):
    """Follows every copy into the parameters of the layers' experts while it is active.

    Args:
        layers: as they are built; their parameters on the host.
        is_packed: whether the experts of a layer are in a pack already: nothing is copied, and so their memory is never
            touched.
    """

    def __init__(self, layers: "Sequence[StreamedExperts]", is_packed: Callable[[int], bool]) -> None:
        super().__init__()
        self.is_packed = is_packed
        self._places = {
            parameter.untyped_storage().data_ptr(): (layer, name)
            for layer in layers
            for name, parameter in layer.expert_parameters().items()
            if not parameter.is_meta and parameter.numel()
        }
        self._layer: StreamedExperts | None = None
        """That was written to last."""
        self._written: dict[str, dict[tuple, int]] = {}
        """Of it, by parameter: numbers copied into each part, once for each part however often it was written."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is COPY:
            target = args[0]
            layer, name = self._places.get(target.untyped_storage().data_ptr(), (None, ""))
            # A finished layer's memory is free, and may be anything else's by now.
            if layer is not None and layer.finished:
                layer = None
            if layer is not self._layer:
                self._leave()
                self._layer, self._written = layer, {}
            if layer is not None:
                if self.is_packed(layer.cache_layer):
                    return target
                part = (target.storage_offset(), *target.shape)
                self._written.setdefault(name, {})[part] = target.numel()
        return func(*args, **(kwargs or {}))

    def _leave(self) -> None:
        layer = self._layer
        # What comes through the weight loader is counted there.
        if layer is None or layer.finished or layer.has_arrivals or self.is_packed(layer.cache_layer):
            return
        written = {name: sum(parts.values()) for name, parts in self._written.items()}
        if all(written.get(name, 0) >= one.numel() for name, one in layer.expert_parameters().items()):
            layer.finish_loading()


class MappedMemory(TorchFunctionMode):
    """Maps the memory of large new tensors on the host, instead of taking it from the heap.

    It is taken when it is written to, also where a quantisation method makes zeros: of all layers, before the first
    weight is there. And it is given back at once when a layer has been taken into the store; the heap would keep what
    is freed below its end (glibc: of up to 32 MiB each).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.zeros, torch.empty) or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return func(*args, **kwargs)
        like = func(*args, **(kwargs | {"device": "meta"}))
        if (
            like.nbytes < MAPPED_BYTES
            or like.requires_grad
            or not like.is_contiguous()
            or kwargs.get("out") is not None
        ):
            return func(*args, **kwargs)
        memory = mmap(-1, like.nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).view(like.shape)


@contextmanager
def on_host() -> Iterator[None]:
    """While it lasts, tensors are made on the host, large ones in memory of their own."""
    with torch.device("cpu"), MappedMemory():
        yield
