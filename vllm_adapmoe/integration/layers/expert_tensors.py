"""Finds the tensors of a layer's experts, wherever vLLM's quantisation methods and kernels keep them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts

MODULE_INTERNALS = {"_parameters", "_buffers", "_modules"}


def own_tensors(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    """Returns every tensor of a layer, its quantisation method and its kernel, each once, by attribute path.

    Kernels keep more than parameters, e.g. converted scales and replaced biases. Parameters come first, and paths are
    reproducible for layers built in the same way.
    """
    selected = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    seen = {id(tensor) for tensor in selected.values()}
    attributes = {name: value for name, value in vars(layer).items() if name not in MODULE_INTERNALS}
    for name, value in (attributes | {"quant_method": vars(layer.quant_method)}).items():
        for path, tensor in _walk(name, value, seen):
            selected[path] = tensor
    return selected


def _walk(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield path, value
        return
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    elif not isinstance(value, nn.Module | type) and _may_hold_tensors(type(value).__module__):
        items = getattr(value, "__dict__", {}).items()
    else:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, item in items:
        yield from _walk(f"{path}.{key}", item, seen)


def _may_hold_tensors(module: str) -> bool:
    return module.startswith("vllm.") and not module.startswith("vllm.config")


@dataclass
class ExpertTensors:
    """A layer's tensors `[experts, ...]` in the kernel's format, whose rows make up the experts' records."""

    tensors: dict[str, torch.Tensor]
    """Tensors by path. Kernels reference these objects, so their memory is replaced, never the objects."""
    _aliases: list[tuple[torch.Tensor, torch.Size, str]] = field(default_factory=list)
    """Other tensor objects that share a tensor's memory: object, its shape per expert, and that tensor's path."""

    @classmethod
    def of(cls, own: Mapping[str, torch.Tensor], names: Collection[str]) -> Self:
        """Selects the tensors called `names`, in that order, from `own`, with their aliases.

        Raises:
            KeyError: `own` lacks one of them.
        """
        selected = cls({})
        for name in [*names, *(name for name in own if name not in names)]:
            tensor = own[name]
            original = next((path for path, other in selected.tensors.items() if _same_memory(tensor, other)), None)
            if original is not None:
                selected._aliases.append((tensor, tensor.shape[1:], original))
            elif name in names:
                selected.tensors[name] = tensor
        return selected

    def holds(self, tensor: object) -> bool:
        """Returns whether this very object is one of the tensors or aliases."""
        return any(tensor is other for other in [*self.tensors.values(), *(alias for alias, _, _ in self._aliases)])

    def replace(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Points every tensor object at `memory`, tensors `[slots, ...]` by path, so that kernels read it."""
        for name, tensor in self.tensors.items():
            tensor.data = memory[name]
        for alias, shape, name in self._aliases:
            alias.data = memory[name].view(-1, *shape)

    def free(self) -> None:
        """Frees the experts' memory."""
        for tensor in [*self.tensors.values(), *(alias for alias, _, _ in self._aliases)]:
            tensor.data = tensor.data.new_empty(0)


def _same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        tensor.dtype == other.dtype
        and tensor.numel() == other.numel() > 0
        and tensor.shape[:1] == other.shape[:1]
        and tensor.data_ptr() == other.data_ptr()
        and tensor.is_contiguous()
        and other.is_contiguous()
    )
