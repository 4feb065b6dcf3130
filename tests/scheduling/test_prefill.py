"""When waiting prompts run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.scheduling.prefill import Waiting, hold_prefill

DECODING = [0] * 4
LIMITS = {"surcharge": 0.1, "token_budget": 2048, "seats": 8, "max_delay": 1.0}


def held(*waiting: Waiting, decoding=DECODING, **limits) -> bool:
    return hold_prefill(waiting, decoding, **LIMITS | limits)


def test_waits_until_its_waiting_costs_what_the_sweep_costs():
    assert held(Waiting(0.0, 10))
    assert held(Waiting(0.39, 10))
    assert not held(Waiting(0.41, 10))  # 4 decoding requests would each have waited 0.1 s
    assert not held(Waiting(0.25, 10), Waiting(0.16, 10))
    assert held(Waiting(0.41, 10), decoding=[0] * 5)


@pytest.mark.parametrize(
    ("waiting", "changes"),
    [
        ([], {}),
        ([Waiting(0.0, 10)], {"decoding": []}),  # nobody to spare
        ([Waiting(0.0, 10)], {"surcharge": 0.0}),  # not known yet, or every expert is there
        ([Waiting(0.0, 10)], {"seats": 1}),  # nobody could join it
        ([Waiting(0.0, 1000), Waiting(0.0, 1048)], {}),  # a whole step's worth
        ([Waiting(0.2, 10)], {"max_delay": 0.2}),
        ([Waiting(0.0, 10)], {"max_delay": 0.0}),
        ([Waiting(0.0, 10, priority=-1)], {}),  # more urgent than those it would wait for
    ],
)
def test_does_not_wait(waiting, changes):
    assert not held(*waiting, **changes)


def test_less_urgent_ones_may_wait():
    assert held(Waiting(0.0, 10, priority=1))


def best_cost(arrivals: list[float], sweep: float) -> float:
    """Least of waits and sweeps, with every arrival known in advance: groups that end with an arrival."""
    best = [0.0]
    for end in range(1, len(arrivals) + 1):
        costs = (
            best[start] + sweep + sum(arrivals[end - 1] - one for one in arrivals[start:end]) for start in range(end)
        )
        best.append(min(costs))
    return best[-1]


@given(
    gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=12),
    surcharge=st.floats(0.01, 0.3),
    decoding=st.integers(1, 16),
)
def test_costs_at_most_twice_the_optimum(gaps, surcharge, decoding):
    """Arrivals nobody knows, asked again every millisecond."""
    arrivals = [sum(gaps[: end + 1]) for end in range(len(gaps))]
    cost, waiting, coming, now, tick = 0.0, [], list(arrivals), 0.0, 1e-3
    late = 0
    while coming or waiting:
        now += tick
        while coming and coming[0] <= now:
            waiting.append(coming.pop(0))
        queue = [Waiting(now - one, 1) for one in waiting]
        if waiting and not hold_prefill(queue, [0] * decoding, surcharge, 10**6, 10**6, 1e9):
            cost += decoding * surcharge + sum(one.waited for one in queue)
            late += len(queue)
            waiting = []
    assert cost <= 2 * best_cost(arrivals, decoding * surcharge) + 2 * tick * late
