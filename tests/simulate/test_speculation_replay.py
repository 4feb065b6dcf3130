"""`examples/speculation.py`: what is decoded with drafts is what was traced, in fewer steps with more experts each."""

import numpy as np
import pytest
from speculation import Routing, measure, resident_drafter, routing_of_requests, speculate

from vllm_adapmoe.simulate.trace import Step, TraceInfo

LENGTHS = [30, 7, 1, 18]
INFO = TraceInfo("m", [16, 16], 2, 0, [100, 100], [0, 0])


@pytest.fixture
def requests() -> list[Routing]:
    random = np.random.default_rng(0)
    shapes = [(2, length, 16) for length in LENGTHS]
    return [Routing(random.random(shape).argsort(axis=2)[:, :, :2], np.ones((*shape[:2], 2))) for shape in shapes]


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_position_is_decoded_once(requests, batch, acceptance):
    steps, output = speculate(requests, batch, 3, acceptance, unrelated=True)
    assert output == sum(LENGTHS)
    assert not any(step.prompt_tokens for step in steps)
    assert max(len(set(step.requests)) for step in steps) == batch
    turns = sum(len(set(step.requests)) for step in steps)
    if acceptance == 0:
        assert turns == sum(LENGTHS)
    elif acceptance == 1:
        assert turns == sum(-(-length // 4) for length in LENGTHS)
    first = {}  # of each turn the first row is the token that is certain, whose routing is the trace's
    for step in steps:
        for row, (name, drafted) in enumerate(zip(step.requests, step.drafted.tolist(), strict=True)):
            if not drafted:
                first[name, int(step.positions[row])] = step.ids[:, row]
    for (name, position), ids in first.items():
        assert np.array_equal(ids, requests[int(name.rpartition("-")[2])].ids[:, position])


def test_rejected_drafts_cost_more_where_they_are_unrelated(requests):
    """Every draft is rejected: at best it uses the experts that the next step needs, and nothing more is fetched."""
    alone, best, worst = (
        measure(INFO, requests, [8], 1, drafts, 0.0, unrelated)
        for drafts, unrelated in ((0, False), (1, False), (1, True))
    )
    assert alone["tokens_per_turn"] == best["tokens_per_turn"] == worst["tokens_per_turn"] == 1
    assert alone["experts_per_event"] == 2 < best["experts_per_event"]
    assert alone["bytes_per_token"] <= best["bytes_per_token"] < worst["bytes_per_token"]


def test_reads_requests_of_a_trace(requests):
    routing = requests[0]
    steps = [
        Step(0.0, ["a"] * 4 + ["b"], np.arange(5), routing.ids[:, :5], routing.weights[:, :5], {}),
        Step(1.0, ["b", "a"], np.arange(2), routing.ids[:, 5:7], routing.weights[:, 5:7], {}),
    ]
    a, b = routing_of_requests(steps)
    assert np.array_equal(a.ids, routing.ids[:, [0, 1, 2, 3, 6]])
    assert np.array_equal(b.ids, routing.ids[:, [4, 5]])


def test_a_drafter_that_uses_one_expert_need_not_have_all_resident():
    """Three quarters of 8 are 6 slots: enough for both if they share, else 2 for the first layer, which misses."""
    info = TraceInfo("m", [4, 4], 1, 0, [100, 100], [0, 0])
    turns = [[number % 4] for number in range(8)]
    steps = [
        Step(0.0, ["a"], np.array([place]), np.array([[turn], [[0]]]), np.ones((2, 1, 1)), {})
        for place, turn in enumerate(turns)
    ]
    (point,) = resident_drafter(info, steps, 1)  # a quarter and a half leave the first layer none
    assert point["resident"] == 0.75
    assert 5 / 8 <= point["bytes_ratio"] < 1
