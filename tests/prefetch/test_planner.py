"""What the planner fetches ahead, and in which order."""

from dataclasses import dataclass

import numpy as np

from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.policy.prefetch_planner import PrefetchPlanner


def planner_for(num_experts: list[int], top_k: int, lookahead: int, max_experts: int) -> PrefetchPlanner:
    """A planner of a cache with nothing in it."""
    return PrefetchPlanner(num_experts, top_k, lookahead, max_experts, Holding(max(num_experts)))


@dataclass
class Holding:
    """A cache with some experts, and some whole layers."""

    experts: int
    resident: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()

    def slots_of(self, layer: int) -> np.ndarray:
        slots = np.full(self.experts, -1, dtype=np.int32)
        slots[list(self.resident)] = 0
        return slots

    def is_complete(self, layer: int) -> bool:
        return layer in self.whole


def test_residents_are_not_requested():
    planner = PrefetchPlanner([4] * 3, 2, lookahead=2, max_experts=1, cache=Holding(4, resident=(0,)))
    assert planner.plan(0, {1: said(0, 1)}.get, lambda *_: True, 0) == [(1, 1)], "room for one, which 0 takes not"
    assert planner.plan_first_layers(100, [], lambda *_: True) == [(0, 1), (0, 2), (0, 3)]


def test_whole_layers_are_not_predicted():
    planner = PrefetchPlanner([4] * 3, 2, lookahead=2, max_experts=1, cache=Holding(4, whole=(1,)))
    assert planner.plan(0, {2: said(2, 3)}.__getitem__, lambda *_: True, 0) == [(2, 2)]
    assert planner.has_targets(0) and planner.has_targets(1) and not planner.has_targets(2)
    planner.cache.whole = (1, 2)
    assert not planner.has_targets(0)


def test_layers_that_rarely_find_experts_missing_are_not_predicted():
    planner = planner_for([4] * 3, 2, lookahead=1, max_experts=1)
    for _ in range(100):
        planner.record_missing(1, 0)
    assert not planner.has_targets(0)
    assert planner.plan(0, {}.__getitem__, lambda *_: True, 0) == [], "nothing is computed for it"
    assert planner.has_targets(1), "of layer 2 nothing is known yet"
    planner.prompt_tokens = 100
    assert planner.has_targets(0), "a sweep needs no prediction"
    planner.prompt_tokens = 0
    for _ in range(4):  # a change of traffic
        planner.record_missing(1, 1)
    assert planner.has_targets(0)


def test_large_experts_are_predicted_although_they_are_rarely_missing():
    """A prefetch of one hides more than a prediction costs."""
    small, large = (
        PrefetchPlanner([4] * 2, 2, lookahead=1, max_experts=1, cache=Holding(4), expert_bytes=[size] * 2)
        for size in (300_000, 350_000_000)
    )
    for planner in (small, large):
        for event in range(200):
            planner.record_missing(1, event % 20 == 0)
    assert large.has_targets(0) and not small.has_targets(0)


def said(*experts: int) -> PredictedExperts:
    return PredictedExperts(np.array([experts]), np.ones((1, len(experts)), dtype=bool))


def teach(planner: PrefetchPlanner, layer: int, first_right: bool, second_right: bool) -> None:
    """The layer's next-gate predictions are right, or not, for long enough."""
    for _ in range(3000):
        planner.plan(layer - 1, {1: said(0, 1)}.get, lambda *_: False, 0)
        ids = np.array([[0 if first_right else 2, 1 if second_right else 3]])
        planner.record(layer, ids, np.ones((1, 2), dtype=bool))


def test_only_what_is_likely():
    planner = planner_for([4, 4], 2, lookahead=1, max_experts=4)
    teach(planner, 1, first_right=True, second_right=False)
    assert planner.plan(0, {1: said(3, 2)}.get, lambda *_: True, 0) == [(1, 3)]
    teach(planner, 1, first_right=True, second_right=True)
    assert planner.plan(0, {1: said(3, 2)}.get, lambda *_: True, 0) == [(1, 3), (1, 2)]


def test_a_batch_is_ranked_by_the_chance_that_any_token_uses_it():
    planner = planner_for([4, 4], 2, lookahead=1, max_experts=2)
    batch = PredictedExperts(np.array([[0, 3], [1, 3]]), np.ones((2, 2), dtype=bool))
    assert planner.plan(0, {1: batch}.get, lambda *_: True, 0) == [(1, 3), (1, 0)]  # 1 - 0.4^2 against 0.6


def test_looks_further_only_if_nothing_nearer_is_missing():
    planner = planner_for([4] * 3, 2, lookahead=2, max_experts=1)
    predicted = {1: said(0, 1), 2: said(2, 3)}
    assert planner.plan(0, predicted.get, lambda *_: True, 0) == [(1, 0)]
    assert planner.plan(0, predicted.get, lambda key, sure: key[0] == 2, 0) == [(2, 2)]
    assert planner.plan(0, predicted.get, lambda *_: True, in_flight=1) == []


def test_what_is_sure_counts_for_no_limit():
    planner = planner_for([8, 8], 2, lookahead=1, max_experts=1)
    batch = PredictedExperts(np.array([[0, 1]] * 4 + [[2, 3]] * 2), np.ones((6, 2), dtype=bool))
    asked = []
    chosen = planner.plan(0, {1: batch}.get, lambda key, sure: asked.append((key, sure)) is None, 0)
    assert chosen == [(1, 0), (1, 1), (1, 2)]  # 1 - 0.4^4 twice, then the likelier ones of 1 - 0.4^2
    assert asked == [((1, 0), True), ((1, 1), True), ((1, 2), False)]


def test_a_prompt_is_a_sweep_in_layer_order():
    planner = planner_for([8] * 3, 2, lookahead=2, max_experts=1)
    every = [[(layer, expert) for expert in range(8)] for layer in range(3)]

    def never(distance: int) -> PredictedExperts:
        raise AssertionError("a sweep asks no gate")

    assert planner.plan_first_layers(100, [], lambda *_: True) == every[0]
    assert planner.plan(0, never, lambda _, sure: sure, in_flight=8) == every[1]
    assert planner.plan(1, never, lambda *_: True, in_flight=8) == every[2]
    assert planner.plan(-1, {1: said(5, 6)}.get, lambda *_: True, 0) == [(0, 5)]  # the step after it need not be one
    assert planner.plan_first_layers(0, [], lambda *_: True) == []
    assert planner.plan(0, {1: said(3, 4)}.get, lambda *_: True, 0) == [(1, 3)]


def test_a_step_begins_with_what_its_requests_are_expected_to_use():
    planner = planner_for([4] * 3, 2, lookahead=2, max_experts=1)
    chances = [np.array([0.2, 0.6, 0.95, 0.0]), np.array([0.7, 0.6, 0.1, 0.0])]
    assert planner.plan_first_layers(0, chances, lambda *_: True) == [(0, 2), (0, 1)]
    assert planner.plan_first_layers(0, chances, lambda key, sure: key[0] == 1) == [(1, 0)]


def test_never_more_than_max_experts():
    planner = planner_for([8, 8], 4, lookahead=1, max_experts=3)
    assert len(planner.plan(0, {1: said(0, 1, 2, 3)}.get, lambda *_: True, 0)) == 3


def test_layers_that_differ_in_experts_and_in_how_many_a_token_uses():
    planner = planner_for([4, 8, 2], 3, lookahead=2, max_experts=8)
    predicted = {1: said(7), 2: said(1, 0)}
    assert planner.plan(0, predicted.get, lambda *_: True, 0) == [(1, 7)]
    planner.record(1, np.array([[7]]), np.ones((1, 1), dtype=bool))
    assert planner.plan(0, predicted.get, lambda key, _: key[0] == 2, 0) == [(2, 0), (2, 1)]
    planner.record(2, np.array([[1, 0]]), np.ones((1, 2), dtype=bool))
    assert planner.plan_first_layers(0, [np.array([0.9, 0.0, 0.0, 0.9])], lambda *_: True) == [(0, 0), (0, 3)]
