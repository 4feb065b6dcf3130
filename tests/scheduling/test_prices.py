"""What steps are found to cost."""

import pytest

from vllm_adapmoe.scheduling.prices import StepPrices
from vllm_adapmoe.scheduling.report import StepReport


def step(stall: float, seconds: float = 1.0, loads: int = 0, fetching: float = 0.0) -> StepReport:
    return StepReport(8, 0, {}, seconds, stall, loads, fetching)


def test_nothing_is_known_at_first():
    prices = StepPrices()
    assert prices.surcharge == 0 and prices.decode_step == 0
    prices.observe(step(0.5), prefill=True)
    prices.observe(step(0.2), prefill=False)
    assert prices.surcharge == 0  # decode steps after decode steps are not known


def test_a_prompt_costs_its_own_waits_and_those_of_the_step_after_it():
    prices = StepPrices()
    for _ in range(5):
        prices.observe(step(0.2), prefill=False)
    prices.observe(step(0.5), prefill=True)
    prices.observe(step(0.3), prefill=False)
    assert prices.surcharge == pytest.approx(0.5 + 0.1 - 0.2)
    assert prices.decode_step == pytest.approx((5 * 0.8 + 0.7) / 6 + 0.2)


def test_chunks_in_a_row_are_one_price_each():
    prices = StepPrices()
    prices.observe(step(0.1), prefill=False)
    for stall in (0.4, 0.6):
        prices.observe(step(stall), prefill=True)
    assert prices.surcharge == pytest.approx(0.3)


def test_loads_are_priced_by_the_time_the_link_was_busy():
    prices = StepPrices()
    prices.observe(step(0.1, loads=4, fetching=0.2), prefill=False)
    prices.observe(step(0.0), prefill=False)
    assert prices.load.value == pytest.approx(0.05)
