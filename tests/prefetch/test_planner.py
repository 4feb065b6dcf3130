"""What the planner fetches ahead, and in which order."""

import numpy as np

from vllm_adapmoe.prefetch.foresight import Foretold
from vllm_adapmoe.prefetch.planner import PrefetchPlanner


def said(*experts: int) -> Foretold:
    return Foretold(np.array([experts]), np.ones((1, len(experts)), dtype=bool))


def teach(planner: PrefetchPlanner, layer: int, first_right: bool, second_right: bool) -> None:
    """The layer's next-gate predictions are right, or not, for long enough."""
    for _ in range(3000):
        planner.plan(layer - 1, {1: said(0, 1)}.get, lambda _: False, 0)
        ids = np.array([[0 if first_right else 2, 1 if second_right else 3]])
        planner.record(layer, ids, np.ones((1, 2), dtype=bool))


def test_only_what_is_likely():
    planner = PrefetchPlanner([4, 4], 2, lookahead=1, max_experts=4)
    teach(planner, 1, first_right=True, second_right=False)
    assert planner.plan(0, {1: said(3, 2)}.get, lambda _: True, 0) == [(1, 3)]
    teach(planner, 1, first_right=True, second_right=True)
    assert planner.plan(0, {1: said(3, 2)}.get, lambda _: True, 0) == [(1, 3), (1, 2)]


def test_a_batch_is_ranked_by_the_chance_that_any_token_uses_it():
    planner = PrefetchPlanner([4, 4], 2, lookahead=1, max_experts=2)
    batch = Foretold(np.array([[0, 3], [1, 3], [2, 3]]), np.ones((3, 2), dtype=bool))
    assert planner.plan(0, {1: batch}.get, lambda _: True, 0) == [(1, 3), (1, 0)]  # 1 - 0.4^3 against 0.6


def test_looks_further_only_if_nothing_nearer_is_missing():
    planner = PrefetchPlanner([4] * 3, 2, lookahead=2, max_experts=1)
    foretold = {1: said(0, 1), 2: said(2, 3)}
    assert planner.plan(0, foretold.get, lambda _: True, 0) == [(1, 0)]
    assert planner.plan(0, foretold.get, lambda key: key[0] == 2, 0) == [(2, 2)]
    assert planner.plan(0, foretold.get, lambda _: True, under_way=1) == []


def test_never_more_than_max_experts():
    planner = PrefetchPlanner([8, 8], 4, lookahead=1, max_experts=3)
    assert len(planner.plan(0, {1: said(0, 1, 2, 3)}.get, lambda _: True, 0)) == 3
