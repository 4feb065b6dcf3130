"""Creates large host tensors in memory of their own, which the operating system gets back when they are freed."""

from collections.abc import Iterator
from contextlib import contextmanager
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAPPED_BYTES = 1 << 16
"""Minimum size of a tensor with memory of its own."""


class MappedMemory(TorchFunctionMode):
    """Allocates large new host tensors with `mmap` instead of from the heap.

    Their pages are allocated only when written, even where a quantisation method creates zeros for all layers before
    the first weight is loaded. And they are returned to the system as soon as a layer is in the store; the heap would
    keep freed blocks below its end (glibc: up to 32 MiB each).
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
    """Creates tensors on the host inside the context, large ones in memory of their own (`MappedMemory`)."""
    with torch.device("cpu"), MappedMemory():
        yield
