"""Experts that requests are expected to use next."""

import numpy as np
import pytest

from vllm_adapmoe.prefetch.request_experts import REUSE, RequestExperts


def test_a_batch_is_expected_to_use_what_any_of_it_is():
    experts = RequestExperts(1, 3)
    assert experts.batch_chances(["a"]) is None
    experts.begin(["a", "b"])
    experts.record_prediction(0, np.array([[0.5, 0.0, 1.2], [0.5, 0.2, -0.1]]))
    experts.end()
    chances = experts.batch_chances(["a", "b", "unknown"])
    assert np.array_equal(chances, chances.astype(np.float16)), "a replay of the trace sees the same"
    assert chances[0] == pytest.approx([0.75, 1 - 0.995 * 0.8, 1 - 0.005 * 0.995], abs=1e-3)
    experts.forget(["b"])
    assert experts.batch_chances(["a", "b"])[0, 0] == 0.5


def test_a_layer_of_another_batch_is_left_out():
    """A dummy run, or one whose rows cannot be told apart."""
    experts = RequestExperts(1, 3)
    experts.begin(["a"])
    experts.record_used(0, np.array([[0], [1]]))
    experts.end()
    assert experts.batch_chances(["a"])[0].max() < REUSE


def test_reuse_is_measured():
    """Half of the experts of every token are those of the token before, in the first layer; none in the second."""
    experts = RequestExperts(2, 64)
    for token in range(400):
        experts.begin(["a", "b"])
        used = np.array([[0, 1 + token % 20], [40, 41 + token % 20]])
        experts.record_used(0, used)
        experts.record_used(1, np.array([[2 * (token % 10), 1], [40 + 2 * (token % 10), 3]]) + token % 2)
        experts.end()
        experts.end()  # after a step that is recorded later, as one that a GPU decides
    assert experts.reuse(0) == pytest.approx(0.5, abs=0.01)
    assert experts.reuse(1) < 0.01
    assert experts.batch_chances(["a"])[0, 0] == pytest.approx(experts.reuse(0), abs=1e-3)


def test_a_request_that_has_ended_does_not_come_back():
    """Steps that a GPU decides are told of when they have run: when their request may have ended."""
    experts = RequestExperts(2, 4)
    experts.begin(["a", "b"])
    experts.record_used(0, np.array([[0, 1], [2, 3]]))
    experts.forget(["a"])
    experts.end()
    assert set(experts.chances) == {"b"}
