"""Rounds weights to 8 bits by row, and to 4 bits in groups with the scales of least squared error."""

from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_adapmoe.policy.compiled import vectorised

INT8 = 127
"""Largest 8-bit integer used; the range is symmetric, as vLLM's kernels for int8 expect."""
INT4_LEAST, INT4_MOST = -8, 7
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales that are tried for each group of 4-bit weights, as shares of the one that clips no weight. A smaller one clips
the largest weights and rounds all others more finely. Of normally distributed weights these seven get within 1 % of the
error of a search in steps of 0.01, and 4 to 6 % below that of the first alone. At 8 bits such a search gains nothing
(`tests/precision/test_rounding.py`)."""


class Rounded(NamedTuple):
    """Weights as integers with scales: `integers * scales` is close to them."""

    integers: torch.Tensor
    """Int8 `[rows, columns]`."""
    scales: torch.Tensor
    """`[rows, groups]`: one for each group of a row, or one for the row."""
    squared_error: float
    """Sum of squared differences from the weights."""


def round_to_int8(weights: torch.Tensor) -> Rounded:
    """Rounds a matrix to -127 .. 127, each row with a float32 scale that takes its largest weight to the end.

    Args:
        weights: `[rows, columns]`, floating point, finite.
    """
    values = weights.float()
    scales = values.abs().amax(1, keepdim=True) / INT8
    integers = (values / torch.where(scales == 0, 1.0, scales)).round_().clamp_(-INT8, INT8)
    error = (integers * scales - values).square_().double().sum()
    return Rounded(integers.to(torch.int8), scales, float(error))


def round_to_int4(weights: torch.Tensor, group: int, scale_dtype: torch.dtype) -> Rounded:
    """Rounds a matrix to -8 .. 7, each group of a row with a scale of its own.

    A group's largest weight is taken to the negative end of the range, which reaches one step further than the positive
    one: the scale of a group whose largest weight is positive is negative.

    Args:
        weights: `[rows, columns]`, floating point, finite.
        group: number of consecutive weights of a row that share a scale; divides the number of columns.
        scale_dtype: dtype of the scales. They are rounded to it before the weights are rounded with them.
    """
    values = weights.to("cpu", torch.float32).contiguous()
    groups = values.unflatten(1, (-1, group))
    most, least = groups.amax(2), groups.amin(2)
    largest = torch.where(most > -least, most, least)
    # With a dtype: while vLLM loads a model, the default one is the model's.
    shares = torch.tensor(SHARES, dtype=torch.float32) / INT4_LEAST
    candidates = (largest.unsqueeze(2) * shares).to(scale_dtype)
    # Their inverse would be infinite: all of these weights round to zero.
    candidates[candidates.abs() < torch.finfo(torch.float32).tiny] = 0
    integers = torch.empty(values.shape, dtype=torch.int8)
    best = torch.zeros(largest.shape, dtype=torch.int64)
    error = _round_groups(values.numpy(), candidates.float().numpy(), integers.numpy(), best.numpy())
    scales = candidates.gather(2, best.unsqueeze(2)).squeeze(2)
    return Rounded(integers.to(weights.device), scales.to(weights.device), error)


@vectorised
def _round_groups(values: np.ndarray, candidates: np.ndarray, integers: np.ndarray, best: np.ndarray) -> float:
    """Rounds each group with each candidate for its scale, and keeps the one of least squared error.

    Args:
        values: float32 `[rows, columns]`.
        candidates: scales to try, float32 `[rows, groups, candidates]`.
        integers: receives the rounded values, int8 `[rows, columns]`.
        best: receives the index of the chosen candidate, int64 `[rows, groups]`.

    Returns:
        The sum of the least squared errors.
    """
    rows, groups, count = candidates.shape
    group = values.shape[1] // groups
    total = 0.0
    for row in range(rows):
        for number in range(groups):
            start = number * group
            least: Any = np.float32(np.inf)
            for index in range(count):
                scale = candidates[row, number, index]
                inverse = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
                error: Any = np.float32(0.0)
                for column in range(start, start + group):
                    value = values[row, column]
                    rounded = min(max(np.rint(value * inverse), np.float32(INT4_LEAST)), np.float32(INT4_MOST))
                    difference = rounded * scale - value
                    error += difference * difference
                if error < least:
                    least = error
                    best[row, number] = index
            scale = candidates[row, number, best[row, number]]
            inverse = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
            for column in range(start, start + group):
                rounded = np.rint(values[row, column] * inverse)
                integers[row, column] = np.int8(min(max(rounded, np.float32(INT4_LEAST)), np.float32(INT4_MOST)))
            total += least
    return total


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """Packs eight values from -8 to 7 into an int32, the first in the lowest bits, as compressed-tensors does.

    Args:
        integers: int8 `[..., columns]`, columns a multiple of 8.

    Returns:
        int32 `[..., columns / 8]`.
    """
    values = (integers.to(torch.int32) - INT4_LEAST).unflatten(-1, (-1, 8))
    packed = values[..., 0].clone()
    for place in range(1, 8):
        packed |= values[..., place] << (4 * place)
    return packed
