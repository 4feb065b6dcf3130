"""Gates of later layers, and a next-token head, on the experts' input."""

import numpy as np
import pytest
import torch

from vllm_adapmoe.integration.gate_stack import GateStack

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_in_a_worker():
    with torch.inference_mode():
        yield


def stack(gates, hidden, head=None):
    return GateStack(gates, head, hidden, torch.float32, CPU)


def test_input_that_a_kernel_has_padded():
    """gpt-oss on Marlin: the experts' input has columns of zeros that neither gate nor head takes."""
    gate = torch.nn.Linear(6, 4)
    head = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    x = torch.randn(2, 6)
    outputs = stack([gate], 8, head).outputs(torch.nn.functional.pad(x, (0, 2)))
    assert np.allclose(outputs[:, :4], gate(x), atol=1e-6)
    assert np.allclose(outputs[:, 4:], x.numpy() @ head[:-1] + head[-1], atol=1e-6)


def test_a_head_that_was_made_for_a_padded_input():
    head = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    x = torch.randn(2, 6)
    assert np.allclose(stack([], 6, head).outputs(x), x.numpy() @ head[:6] + head[-1], atol=1e-6)


def test_a_gate_of_another_input_says_nothing():
    """Latent experts: their input is smaller than what the router sees."""
    gates = [torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)]
    made = stack(gates, 6)
    assert made.slices == [None, slice(0, 4)] and made.outputs(torch.zeros(1, 6)).shape == (1, 4)
