"""When waiting prompts run."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.scheduling.arrivals import Arrivals
from vllm_adapmoe.scheduling.prefill import WaitingPrompt, hold_prefill

DECODING = [0] * 4
LIMITS = {"surcharge": 0.1, "gap": 0.1, "token_budget": 2048, "max_delay": 1.0}


def held(*waiting: WaitingPrompt, decoding=DECODING, **limits) -> bool:
    return hold_prefill(waiting, decoding, **LIMITS | limits)


def test_waits_while_one_more_is_worth_it():
    assert held(WaitingPrompt(0.0, 10))
    assert held(
        WaitingPrompt(0.3, 10), WaitingPrompt(0.0, 10)
    )  # a third: 3 x 0.1 s more waiting, 4 x 0.1 s less of sweeps
    assert not held(*[WaitingPrompt(0.0, 10)] * 3)
    assert held(*[WaitingPrompt(0.0, 10)] * 3, decoding=[0] * 7)
    assert not held(WaitingPrompt(0.0, 10), gap=0.41)  # nobody is coming


@pytest.mark.parametrize(
    ("waiting", "changes"),
    [
        ([], {}),
        ([WaitingPrompt(0.0, 10)], {"decoding": []}),  # nobody to spare
        ([WaitingPrompt(0.0, 10)], {"surcharge": 0.0}),  # not known yet, or every expert is there
        ([WaitingPrompt(0.0, 10)], {"gap": math.inf}),  # none has ever come
        ([WaitingPrompt(0.0, 1000), WaitingPrompt(0.0, 1048)], {}),  # a whole step's worth
        ([WaitingPrompt(0.2, 10)], {"max_delay": 0.2}),
        ([WaitingPrompt(0.0, 10)], {"max_delay": 0.0}),
        ([WaitingPrompt(0.0, 10, priority=-1)], {}),  # more urgent than those it would wait for
    ],
)
def test_does_not_wait(waiting, changes):
    assert not held(*waiting, **changes)


def test_less_urgent_ones_may_wait():
    assert held(WaitingPrompt(0.0, 10, priority=1))


@given(decoding=st.integers(1, 64), surcharge=st.floats(0.001, 1), gap=st.floats(0.001, 1))
def test_begins_at_the_best_number(decoding, surcharge, gap):
    """Of all numbers of prompts to share a sweep, the least that costs nothing more than the best."""
    number = 1
    while (
        held(*[WaitingPrompt(0.0, 1)] * number, decoding=[0] * decoding, surcharge=surcharge, gap=gap) and number < 512
    ):
        number += 1

    def cost(number: int) -> float:
        return decoding * surcharge / number + gap * (number - 1) / 2

    best = min(range(1, 513), key=cost)
    assert cost(number) == pytest.approx(cost(best))


def cost_per_prompt(gaps: list[float], sweep: float, hold) -> float:
    """Waits and sweeps of prompts that come so far apart; `hold(waiting, gap)`, asked every ten milliseconds."""
    coming = [sum(gaps[: end + 1]) for end in range(len(gaps))]
    arrivals, cost, now, waiting, seen = Arrivals(), 0.0, 0.0, [], 0
    while seen < len(coming) or waiting:
        now += 0.01
        while seen < len(coming) and coming[seen] <= now:
            waiting.append(coming[seen])
            seen += 1
            arrivals.observe(now, seen)
        if waiting and (seen == len(coming) or not hold(len(waiting), arrivals.gap(now))):
            cost += sweep + sum(now - one for one in waiting)
            waiting = []
    return cost / len(gaps)


@pytest.mark.parametrize("rate", [0.5, 2, 10, 40])
def test_against_beginning_at_once_and_against_every_fixed_number(rate):
    """With the rate measured as it goes: nearly as good as the best number in hindsight, never much worse than none."""
    generator, sweep = random.Random(1), 4 * 0.15
    gaps = [generator.expovariate(rate) for _ in range(200)]

    def rule(waiting: int, gap: float) -> bool:
        return held(*[WaitingPrompt(0.0, 1)] * waiting, surcharge=0.15, gap=gap)

    ours = cost_per_prompt(gaps, sweep, rule)
    fixed = [cost_per_prompt(gaps, sweep, lambda waiting, gap, number=number: waiting < number)
             for number in range(1, 12)]  # fmt: skip
    assert ours < 1.1 * min(fixed)
    assert ours < 1.02 * fixed[0]
    if rate > 2:
        assert ours < 0.75 * fixed[0]


def test_a_silence_ends_the_waiting():
    arrivals = Arrivals()
    assert arrivals.gap(5.0) == math.inf
    for number in range(20):
        arrivals.observe(0.1 * number, number)
    assert arrivals.gap(1.9) == pytest.approx(0.1)
    assert arrivals.gap(4.9) == pytest.approx(3.0)
    arrivals.observe(4.9, 21)  # two at once
    assert arrivals.gap(4.9) == pytest.approx(0.9 * (0.9 * 0.1 + 0.1 * 3.0))
    arrivals.observe(5.0, 20)  # one has been aborted
    arrivals.observe(5.0, 21)
    assert arrivals.gap(5.0) < 0.4
