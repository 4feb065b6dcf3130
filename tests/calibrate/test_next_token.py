"""Next-token heads: fitted, kept beside their profile, and what a cache is told of them."""

import numpy as np
import pytest
import torch

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.policy.chances import MAX_PROB, MIN_PROB, chance_of_any
from vllm_adapmoe.prefetch.heads import NextTokenHeads, heads_path
from vllm_adapmoe.profile.next_token import GRAM_BYTES, RIDGE, HeadFit, layers_at_a_time


def test_a_fit_is_the_ridge_regression_of_all_parts():
    generator = torch.Generator().manual_seed(3)
    x, used = torch.randn(500, 7, generator=generator), (torch.rand(500, 4, generator=generator) < 0.3).float()
    fit = HeadFit(7, 4)
    for start in range(0, 500, 123):
        fit.add(x[start : start + 123], used[start : start + 123])
    inputs = torch.cat([x, torch.ones(500, 1)], 1).double()
    penalty = torch.diag((RIDGE * inputs.square().sum(0)).sqrt())  # least squares with rows that pull to zero
    stacked = torch.cat([inputs, penalty]), torch.cat([used.double(), torch.zeros(8, 4)])
    expected = torch.linalg.lstsq(*stacked).solution
    assert torch.allclose(torch.from_numpy(fit.solve()).double(), expected, atol=1e-5)


def test_a_head_finds_what_is_linear():
    """Expert e is used by the next token where input e is positive."""
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    fit = HeadFit(6, 3)
    fit.add(x, (x[:, :3] > 0).float())
    weights = fit.solve()
    chances = x.numpy() @ weights[:-1] + weights[-1]
    assert ((chances > 0.5) == (x[:, :3].numpy() > 0)).mean() > 0.98
    assert weights[-1] == pytest.approx([0.5] * 3, abs=0.05)


def test_a_layer_too_big_is_fitted_alone():
    assert layers_at_a_time(128) > 1000
    assert layers_at_a_time(1 << 20) == 1
    assert layers_at_a_time(4096) * 8 * 4097**2 <= GRAM_BYTES


def heads() -> NextTokenHeads:
    generator = np.random.default_rng(0)
    return NextTokenHeads(
        [generator.normal(size=(5, 3)).astype(np.float32) for _ in range(11)],
        generator.normal(size=(5, 3)).astype(np.float32),
    )


def test_saved_and_loaded(tmp_path):
    made, path = heads(), heads_path(tmp_path / "model.json")
    assert path.name == "model.heads"
    digest = made.save(path)
    assert made.save(path) == digest, "equal heads, equal files"
    loaded = NextTokenHeads.load(path, digest, 11, 4, 3)
    assert len(loaded.layers) == 11 and np.array_equal(loaded.first, made.first)
    assert all(np.array_equal(one, other) for one, other in zip(loaded.layers, made.layers, strict=True))


def test_heads_of_another_profile_are_refused(tmp_path):
    path = tmp_path / "model.heads"
    with pytest.raises(AdapMoEError, match=r"cannot be read .* put the file beside the profile"):
        NextTokenHeads.load(path, "0", 11, 4, 3)
    digest = heads().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapMoEError, match="differ from those that the profile was made with"):
        NextTokenHeads.load(path, digest, 11, 4, 3)


def test_chance_of_a_batch():
    outputs = np.array([[0.5, -1.0, 2.0], [0.5, 0.2, 0.5]])
    assert chance_of_any(outputs) == pytest.approx([0.75, 1 - (1 - MIN_PROB) * 0.8, 1 - (1 - MAX_PROB) / 2], abs=1e-3)
    assert chance_of_any(outputs[:1]) == pytest.approx([0.5, MIN_PROB, MAX_PROB], abs=1e-3)
