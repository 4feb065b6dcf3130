"""What steps are found to cost."""

import pytest

from vllm_adapmoe.scheduling.prices import StepPrices
from vllm_adapmoe.scheduling.report import StepTimes, runs_prompt


def step(stall: float, seconds: float = 1.0, loads: int = 0, fetching: float = 0.0, prefill: bool = False) -> StepTimes:
    return StepTimes(seconds, stall, loads, fetching, prefill)


def test_nothing_is_known_at_first():
    prices = StepPrices()
    assert prices.surcharge == 0 and prices.decode_step == 0
    prices.observe(step(0.5, prefill=True))
    prices.observe(step(0.2))
    assert prices.surcharge == 0  # decode steps after decode steps are not known


def test_a_prompt_costs_its_own_waits_and_those_of_the_step_after_it():
    prices = StepPrices()
    for _ in range(5):
        prices.observe(step(0.2))
    prices.observe(step(0.5, prefill=True))
    prices.observe(step(0.3))
    assert prices.surcharge == pytest.approx(0.5 + 0.1 - 0.2)
    assert prices.decode_step == pytest.approx((5 * 0.8 + 0.7) / 6 + 0.2)


def test_chunks_in_a_row_are_one_price_each():
    prices = StepPrices()
    prices.observe(step(0.1))
    for stall in (0.4, 0.6):
        prices.observe(step(stall, prefill=True))
    assert prices.surcharge == pytest.approx(0.3)


def test_loads_are_priced_by_the_time_the_link_was_busy():
    prices = StepPrices()
    prices.observe(step(0.1, loads=4, fetching=0.2))
    prices.observe(step(0.0))
    assert prices.load.value == pytest.approx(0.05)


def test_a_wait_that_the_host_saw_as_longer_than_the_device_the_step_is_no_negative_price():
    prices = StepPrices()
    prices.observe(step(0.011, seconds=0.010))
    assert prices.compute.value == 0


def test_a_prompt_is_told_from_draft_tokens():
    assert not runs_prompt({"a": 1, "b": 3}, {"b": [5, 6]})
    assert runs_prompt({"a": 1, "b": 4}, {"b": [5, 6]})
    assert not runs_prompt({}, {})
