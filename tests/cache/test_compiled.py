"""Compiled loops fail like plain Python, and do not keep vLLM from starting an engine."""

import numpy as np
import pytest

from vllm_adapmoe.policy.prediction import chances, highest


def test_an_index_out_of_bounds_is_an_error():
    with pytest.raises(IndexError):
        chances(np.array([[1, 7]]), np.ones((1, 2), dtype=bool), np.array([0.5, 0.5]), 4)


def test_the_highest_of_each_row():
    values = np.array([[1.0, 3.0, 3.0, 2.0], [np.nan, 0.0, -1.0, 5.0]], dtype=np.float32)
    assert highest(values, 3)[0].tolist() == [1, 2, 3]
    assert len(set(highest(values, 4)[1])) == 4, "whatever NaN is, no column comes twice"


def test_vllm_looks_into_every_module_when_an_engine_starts():
    from vllm.triton_utils.dispatcher import _rebind_kernels

    highest(np.zeros((1, 2), dtype=np.float32), 1)  # LLVM is loaded from here on
    _rebind_kernels([])
