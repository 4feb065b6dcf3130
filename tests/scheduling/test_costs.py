"""What steps are found to cost."""

import pytest

from vllm_adapmoe.scheduling.costs import StepCosts
from vllm_adapmoe.scheduling.report import StepTimes, prompt_rows


def step(stall: float, seconds: float = 1.0, prefill: bool = False) -> StepTimes:
    return StepTimes(seconds, stall, prefill)


def test_nothing_is_known_at_first():
    costs = StepCosts()
    assert costs.surcharge == 0 and costs.stall_share == 0
    costs.observe(step(0.5, prefill=True))
    costs.observe(step(0.2))
    assert costs.surcharge == 0  # decode steps after decode steps are not known


def test_a_prompt_costs_its_own_waits_and_those_of_the_step_after_it():
    costs = StepCosts()
    for _ in range(5):
        costs.observe(step(0.2))
    costs.observe(step(0.5, prefill=True))
    costs.observe(step(0.3))
    assert costs.surcharge == pytest.approx(0.5 + 0.1 - 0.2)
    assert costs.stall_share == pytest.approx(0.2 / ((5 * 0.8 + 0.7) / 6 + 0.2))


def test_chunks_in_a_row_are_one_price_each():
    costs = StepCosts()
    costs.observe(step(0.1))
    for stall in (0.4, 0.6):
        costs.observe(step(stall, prefill=True))
    assert costs.surcharge == pytest.approx(0.3)


def test_a_wait_that_the_host_saw_as_longer_than_the_device_the_step_is_no_negative_price():
    costs = StepCosts()
    costs.observe(step(0.011, seconds=0.010))
    assert costs.compute.value == 0


def test_a_prompt_is_told_from_draft_tokens():
    assert prompt_rows({"a": 1, "b": 3}, {"b": [5, 6]}) == 0
    assert prompt_rows({"a": 1, "b": 4}, {"b": [5, 6]}) == 4
    assert prompt_rows({"a": 7, "b": 3}, {"b": [5, 6]}) == 7
    assert prompt_rows({}, {}) == 0
