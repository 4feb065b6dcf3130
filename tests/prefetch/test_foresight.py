"""What is predicted of a later layer: against the gating of the real thing, and against simulation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.gating.rules import gate_tokens
from vllm_adapmoe.policy.prediction import PRIOR, Precision, PredictedExperts, chances, predict_experts


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1, 3, 9]), st.sampled_from([0.0, 1e-3, 0.05]))
def test_foretells_what_gating_keeps(seed, top_k, tokens, threshold):
    """With the layer's own logits, what is predicted is what routing and gating by token do."""
    logits = np.random.default_rng(seed).normal(size=(tokens, 8)).astype(np.float32)
    predicted = predict_experts(logits, top_k, sensitivity=0.3, threshold=threshold)
    weights, ids = torch.from_numpy(logits).softmax(-1).topk(top_k)
    gated = gate_tokens(weights / weights.sum(-1, keepdim=True), 0.3, threshold)
    assert np.array_equal(predicted.ids, ids.numpy())
    assert np.array_equal(predicted.keep_mask, gated.keep_mask.numpy())


def test_ranks_as_biased_routers_do():
    logits = np.array([[1.0, 0.9, -3.0]])
    correction = np.array([0.0, 0.0, 5.0])
    assert predict_experts(logits, 2, correction=correction).ids.tolist() == [[2, 0]]


@given(st.integers(0, 10**6))
def test_chances_of_a_batch(seed):
    """`1 - prod (1 - b)`, against drawing every token's use of what it ranks."""
    random = np.random.default_rng(seed)
    tokens, experts, precision = 3, 5, np.array([0.7, 0.3])
    ids = np.stack([random.permutation(experts)[:2] for _ in range(tokens)])
    kept = random.random(ids.shape) < 0.8
    expected = np.ones(experts)
    for row in range(tokens):
        for rank in range(2):
            if kept[row, rank]:
                expected[ids[row, rank]] *= 1 - precision[rank]
    found = chances(ids, kept, precision, experts)
    assert found == pytest.approx(1 - expected)


def test_precision_follows_the_traffic():
    precision = Precision(2)
    predicted = PredictedExperts(np.array([[0, 1]]), np.ones((1, 2), dtype=bool))
    for _ in range(2000):
        precision.record(predicted, np.array([[0, 1]]), np.array([[True, False]]))
    assert precision.by_rank == pytest.approx([1, 0], abs=0.02)
    for _ in range(4000):
        precision.record(predicted, np.array([[1, 2]]), np.ones((1, 2), dtype=bool))
    assert precision.by_rank == pytest.approx([0, 1], abs=0.02)


def test_layers_with_fewer_choices_than_others():
    """One precision serves predictions of as many ranks as there are, or fewer: a model's top-k may differ by layer."""
    precision = Precision(3)
    said = predict_experts(np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32), 2)
    chance = chances(*said, precision.by_rank, 8)
    assert set(np.flatnonzero(chance)) == set(said.ids[0]) and chance[said.ids[0]] == pytest.approx(PRIOR)
    for _ in range(2000):
        precision.record(said, said.ids, said.keep_mask)
    assert precision.by_rank[:2] == pytest.approx([1, 1], abs=0.02)
    assert predict_experts(np.zeros((2, 4), dtype=np.float32), 6).ids.shape == (2, 4), "no more than there are experts"


def test_more_ranks_than_a_precision_has_are_no_likelier_than_its_last():
    precision = Precision(1)
    said = predict_experts(np.array([[3.0, 2.0, 1.0]], dtype=np.float32), 2)
    precision.record(said, np.array([[0]]), np.ones((1, 1), dtype=bool))
    assert np.flatnonzero(chances(*said, precision.by_rank, 3)).tolist() == [0]
