"""Tries a router when the model has loaded: whether a product with its input says what it will choose."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

STEP = 16.0
"""Length of the vectors that a map is read off: the longer, the less of it is lost beside a large bias in bf16."""
LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Of random inputs. A router that normalises its input is linear as long as all of them have one length."""
TOLERANCE = 0.05
"""Error of the map over what it says, root mean squares. bf16 gives 0.002, FP8 activations 0.026 (their rounding); a
softmax, a tanh or a normalisation 0.3 and more."""
ROWS = 512
"""Vectors of one call, so that a trial takes little memory."""


class Unpredictable(Exception):
    """A router whose choice cannot be predicted; the text says why."""


@dataclass(frozen=True)
class LinearGate:
    """What a router does to the experts' input."""

    weight: torch.Tensor
    """float32 `[hidden, experts]`."""
    bias: torch.Tensor
    """float32 `[experts]`."""


def try_gate(gate: torch.nn.Module, hidden: int, experts: int, dtype: torch.dtype, device: torch.device) -> LinearGate:
    """Returns a router as a linear map, whatever format its weights are in.

    The router is called on made-up inputs. It may do anything: what it changes of itself is changed back, and what it
    draws at random is not missing from the numbers that tokens are sampled with.

    Args:
        gate: module hidden -> router logits, or a tuple that begins with them.
        hidden: width of the experts' input. A kernel may have padded it with zeros beyond what the router takes.
        experts: that the layer has.
        dtype: of the input.
        device: of the router's weights.

    Raises:
        Unpredictable: it is sharded, wants another input, gives anything but a logit for each expert, or is not linear.
    """
    if any(isinstance(part, ColumnParallelLinear | RowParallelLinear) and part.tp_size > 1 for part in gate.modules()):
        raise Unpredictable("it is shared out to several ranks")
    width = _input_size(gate, hidden)
    if width > hidden:
        raise Unpredictable(f"it sees {width} values of a token, the experts {hidden}")
    with _restored(gate), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        failed: list[Exception] = []
        for each in _dtypes(gate, dtype):
            try:
                return _read(gate, width, hidden, experts, each, device)
            except Unpredictable:
                raise
            except Exception as error:  # whatever somebody's router raises when it is called by itself
                failed.append(error)
        raise Unpredictable(f"{type(failed[0]).__name__}: {failed[0]}")


def _dtypes(gate: torch.nn.Module, dtype: torch.dtype) -> list[torch.dtype]:
    """That of the experts' input, and that of the router's weights: models widen its input for some, outside of it."""
    own = next((parameter.dtype for parameter in gate.parameters() if parameter.is_floating_point()), dtype)
    return [dtype] if own == dtype or own.itemsize < 2 else [dtype, own]


def _read(
    gate: torch.nn.Module, width: int, hidden: int, experts: int, dtype: torch.dtype, device: torch.device
) -> LinearGate:
    def logits(x: torch.Tensor) -> torch.Tensor:
        output = gate(x)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.dim() != 2:
            raise Unpredictable("it gives no logits")
        if output.shape != (len(x), experts):
            raise Unpredictable(f"it gives {output.shape[1]} logits for {experts} experts")
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
    said = x.float() @ rows
    error = logits(x) - bias - said
    if not _rms(error) <= TOLERANCE * _rms(said):  # not a number is not linear either
        raise Unpredictable("it is not linear")
    return LinearGate(pad(rows, (0, 0, 0, hidden - width)), bias)


def _rms(rows: torch.Tensor) -> float:
    """Of rows of `LENGTHS`, each brought to length one: the short ones count, too."""
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
    """Undoes what a call changes of a module: attributes, and the contents of parameters and buffers."""
    tensors = [(tensor, tensor.clone()) for tensor in (*gate.parameters(), *gate.buffers())]
    attributes = [
        (held, dict(held))
        for part in gate.modules()
        for held in (part.__dict__, part.__dict__["_parameters"], part.__dict__["_buffers"])
    ]
    try:
        yield
    finally:
        for held, before in attributes:
            held.clear()
            held.update(before)
        for tensor, contents in tensors:
            if not torch.equal(tensor, contents):
                tensor.copy_(contents)
