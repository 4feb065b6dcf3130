"""Tests, after the model has loaded, whether a router is a linear map of its input, and so can be predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

STEP = 16.0
"""Length of the probe vectors: the longer, the less precision is lost against a large bias in bf16."""
LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Lengths of random test inputs; several, because a router that normalises its input is linear at a fixed length."""
TOLERANCE = 0.05
"""Maximum error of the linear map relative to its output, root mean squares. bf16 gives 0.002, FP8 activations 0.026
(their rounding); a softmax, a tanh or a normalisation 0.3 and more."""
ROWS = 512
"""Probe dimensions per call, to limit the memory of a test."""


class Unpredictable(Exception):
    """Raised for a router whose choice cannot be predicted; the message gives the reason."""


@dataclass(frozen=True)
class LinearGate:
    """A router as a linear map from the experts' input to logits."""

    weight: torch.Tensor
    """Weight, float32 `[hidden, experts]`."""
    bias: torch.Tensor
    """Bias, float32 `[experts]`."""


def try_gate(gate: torch.nn.Module, hidden: int, experts: int, dtype: torch.dtype, device: torch.device) -> LinearGate:
    """Returns a router as a linear map, whatever format its weights are in.

    The router is called on artificial inputs. Side effects are undone: changes to the module are reverted, and random
    draws do not affect the generator that tokens are sampled with.

    Args:
        gate: module hidden -> router logits, or a tuple that begins with them.
        hidden: width of the experts' input. A kernel may have padded it with zeros beyond the router's input.
        experts: number of experts of the layer.
        dtype: dtype of the input.
        device: device of the router's weights.

    Raises:
        Unpredictable: it is sharded, takes another input, does not return one logit per expert, or is not linear.
    """
    if any(isinstance(part, ColumnParallelLinear | RowParallelLinear) and part.tp_size > 1 for part in gate.modules()):
        raise Unpredictable("it is sharded over several ranks")
    width = _input_size(gate, hidden)
    if width > hidden:
        raise Unpredictable(f"its input has {width} values per token, the experts' {hidden}")
    with _restored(gate), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        failed: list[Exception] = []
        for candidate in _dtypes(gate, dtype):
            try:
                return _read(gate, width, hidden, experts, candidate, device)
            except Unpredictable:
                raise
            except Exception as error:  # a model's router may raise anything when called outside the model
                failed.append(error)
        raise Unpredictable(f"{type(failed[0]).__name__}: {failed[0]}")


def _dtypes(gate: torch.nn.Module, dtype: torch.dtype) -> list[torch.dtype]:
    """Returns the input dtypes to try: the experts' input's, and the weights', to which some models cast the input."""
    own = next((parameter.dtype for parameter in gate.parameters() if parameter.is_floating_point()), dtype)
    return [dtype] if own == dtype or own.itemsize < 2 else [dtype, own]


def _read(
    gate: torch.nn.Module, width: int, hidden: int, experts: int, dtype: torch.dtype, device: torch.device
) -> LinearGate:
    def logits(x: torch.Tensor) -> torch.Tensor:
        output = gate(x)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.dim() != 2:
            raise Unpredictable("it returns no logits")
        if output.shape != (len(x), experts):
            raise Unpredictable(f"it returns {output.shape[1]} logits for {experts} experts")
        return output.float()

    bias = logits(torch.zeros(1, width, dtype=dtype, device=device))[0].clone()
    rows = torch.empty(width, experts, device=device)
    for start in range(0, width, ROWS):
        count = min(ROWS, width - start)
        units = torch.zeros(2 * count, width, dtype=dtype, device=device)
        units[:count, start : start + count].fill_diagonal_(STEP)
        units[count:, start : start + count].fill_diagonal_(-STEP)
        plus, minus = logits(units).split(count)
        rows[start : start + count] = (plus - minus) / (2 * STEP)
    x = torch.randn(2 * len(LENGTHS), width, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor(LENGTHS).repeat(2).unsqueeze(1)).to(device, dtype)
    predicted = x.float() @ rows
    error = logits(x) - bias - predicted
    if not _rms(error) <= TOLERANCE * _rms(predicted):  # `not <=`, so that NaN counts as not linear
        raise Unpredictable("it is not linear")
    return LinearGate(pad(rows, (0, 0, 0, hidden - width)), bias)


def _rms(rows: torch.Tensor) -> float:
    """Returns the root mean square of rows, each divided by its input's length so that short inputs count equally."""
    lengths = torch.tensor(LENGTHS, device=rows.device).repeat(2).unsqueeze(1)
    return float((rows / lengths).square().mean().sqrt())


def _input_size(gate: torch.nn.Module, default: int) -> int:
    size = getattr(gate, "input_size", None) or getattr(gate, "in_features", None)
    if isinstance(size, int):
        return size
    weight = getattr(gate, "weight", None)
    return weight.shape[-1] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else default


@contextmanager
def _restored(gate: torch.nn.Module) -> Iterator[None]:
    """Reverts changes to a module after the context: attributes, and the contents of parameters and buffers."""
    tensors = [(tensor, tensor.clone()) for tensor in (*gate.parameters(), *gate.buffers())]
    attributes = [
        (namespace, dict(namespace))
        for part in gate.modules()
        for namespace in (part.__dict__, part.__dict__["_parameters"], part.__dict__["_buffers"])
    ]
    try:
        yield
    finally:
        for namespace, before in attributes:
            namespace.clear()
            namespace.update(before)
        for tensor, contents in tensors:
            if not torch.equal(tensor, contents):
                tensor.copy_(contents)
