"""Weights rounded to 8 and 4 bits: the error, the scales, and the packed form that compressed-tensors unpacks."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from vllm_adapmoe.precision import rounding
from vllm_adapmoe.precision.rounding import pack_int4, round_to_int4, round_to_int8


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def error(weights: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor) -> float:
    groups = integers.double().unflatten(1, (scales.shape[1], -1))
    return float(((groups * scales.double().unsqueeze(2)).flatten(1) - weights.double()).square().sum())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_within_a_hundredth_of_a_fine_search(group, monkeypatch):
    weights = normal(256, 512)
    ours = round_to_int4(weights, group, torch.bfloat16)
    assert error(weights, ours.integers, ours.scales) == pytest.approx(ours.squared_error, rel=1e-4)
    assert ours.integers.min() == -8 and ours.integers.max() == 7
    monkeypatch.setattr(rounding, "SHARES", tuple(1 - step / 100 for step in range(45)))
    finest = round_to_int4(weights, group, torch.bfloat16).squared_error
    monkeypatch.setattr(rounding, "SHARES", (1.0,))
    unclipped = round_to_int4(weights, group, torch.bfloat16).squared_error
    assert finest <= ours.squared_error < 1.02 * finest  # of squares: 1 % of the error
    assert ours.squared_error < 0.94 * unclipped


def test_the_scales_have_the_dtype_that_the_kernel_takes():
    """The weights are rounded with the scale as stored; else the error of bf16 comes on top."""
    weights = normal(64, 128)
    rounded = round_to_int4(weights, 64, torch.bfloat16)
    assert rounded.scales.dtype == torch.bfloat16 and rounded.scales.shape == (64, 2)
    exact = round_to_int4(weights, 64, torch.float32)
    assert rounded.squared_error < 1.01 * exact.squared_error


def test_what_4_bits_can_hold_is_exact():
    scales = torch.tensor([[0.5], [-0.25], [0.0]])
    integers = torch.arange(-8, 8).repeat(3, 2)
    rounded = round_to_int4(integers * scales, 32, torch.float32)
    assert rounded.squared_error == 0.0
    assert torch.equal(rounded.integers * rounded.scales, integers * scales)


def test_int8_by_row():
    weights = normal(64, 96)
    weights[5] = 0
    rounded = round_to_int8(weights)
    assert rounded.integers.abs().amax(1).tolist() == [127 if row != 5 else 0 for row in range(64)]
    assert error(weights, rounded.integers, rounded.scales) == pytest.approx(rounded.squared_error, rel=1e-4)
    for share in (0.99, 0.97, 0.95):  # a smaller scale, which clips, has no less error
        clipped = (weights / (rounded.scales * share).clamp(min=1e-9)).round().clamp(-127, 127)
        assert error(weights, clipped, rounded.scales * share) > 0.99 * rounded.squared_error


def test_packed_as_compressed_tensors_unpacks():
    integers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_int4(integers), 4, torch.Size(integers.shape)), integers)


def test_rounding_does_not_depend_on_the_default_dtype():
    """The one of the model, while vLLM loads it."""
    weights = normal(32, 128).to(torch.bfloat16)
    expected = round_to_int4(weights, 64, torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = round_to_int4(weights, 64, torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(rounded.integers, expected.integers) and torch.equal(rounded.scales, expected.scales)


def test_tiny_weights_are_zero():
    """The inverse of a subnormal scale is infinite."""
    for largest in (1e-40, 2e-38, 0.0):
        weights = torch.zeros(1, 32)
        weights[0, 3] = largest
        rounded = round_to_int4(weights, 32, torch.bfloat16)
        assert torch.isfinite(rounded.integers * rounded.scales).all()
        assert rounded.squared_error <= largest**2 + 1e-45
