"""CUDA graphs on the CPU: what is launched while one is captured is kept, with its memory, and run again by `replay`.

Written from CUDA's programming guide, "CUDA Graphs", "Creating a Graph Using Stream Capture", and PyTorch 2.13's
torch/cuda/graphs.py: a graph holds kernels with their addresses and parameters by value. Python does not run again, a
number that the host had is frozen, results go where they went, and the host may not read while a capture goes on. What
a capture computes is not known until the first replay: here it is overwritten, so that who uses it shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
"""Operations that give the host a value, or memory whose size depends on one."""


class CaptureInvalidated(RuntimeError):
    """cudaErrorStreamCaptureInvalidated, and the like."""


class Recorder(TorchDispatchMode):
    """Keeps operations while it is entered. Kernels that are no operations of PyTorch go through `launch`."""

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.name in READS:
            raise CaptureInvalidated(f"{func._schema.name} reads from the device while a graph is captured")
        return self._keep(func, args, kwargs or {})

    def launch(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """Runs a kernel of another kind, and keeps it."""
        with torch.utils._python_dispatch._disable_current_modes():
            return self._keep(kernel, args, {})

    def _keep(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        tensors = [one for one in tree_iter(output) if isinstance(one, torch.Tensor)]
        self.calls.append((func, args, kwargs, tensors))
        return output

    def poison(self) -> None:
        """Overwrites what was computed."""
        inputs = {one.data_ptr() for one in self._arguments()} - {one.data_ptr() for one in self._results()}
        for tensor in self._results():
            if tensor.is_floating_point() and tensor.data_ptr() not in inputs:
                tensor.fill_(float("nan"))

    def _arguments(self) -> Iterator[torch.Tensor]:
        for _, args, kwargs, _ in self.calls:
            yield from (one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor))

    def _results(self) -> Iterator[torch.Tensor]:
        """Memory that the graph's own operations have made."""
        seen = set()
        for _, args, kwargs, tensors in self.calls:
            given = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
            seen |= {one.untyped_storage().data_ptr() for one in given}
            for one in tensors:
                if one.untyped_storage().data_ptr() not in seen:
                    yield one

    def replay(self) -> None:
        for func, args, kwargs, tensors in self.calls:
            output = func(*args, **kwargs)
            computed = [one for one in tree_iter(output) if isinstance(one, torch.Tensor)]
            for kept, new in zip(tensors, computed, strict=True):
                if new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


class Graph(Recorder):
    """`torch.cuda.CUDAGraph`."""


@contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    assert not Recorder.capturing
    Recorder.capturing = True
    try:
        with graph:
            yield
    finally:
        Recorder.capturing = False
    graph.poison()
