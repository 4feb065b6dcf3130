"""Expected loads and their split over layers: published values, brute force, and simulation."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.allocation import (
    StackDistances,
    _allocate_by_dynamic_programming,
    _allocate_greedily,
    allocate,
    expected_loads,
    is_convex,
)
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import REVISION_STEPS, CacheController
from vllm_adapmoe.policy.eviction import LRU
from vllm_adapmoe.policy.residency import Residency
from vllm_adapmoe.simulate.virtual_link import Machine, VirtualLink

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "adapmoe_published.json").read_text())
MIXTRAL = PUBLISHED["mixtral_8x7b"]


def published_curves(gated: bool) -> list[np.ndarray]:
    single = MIXTRAL["single_expert_ratio"] if gated else [0.0] * 32
    recall = MIXTRAL["prefetch_recall"]
    return [expected_loads(8, 2 - a, [b, b * (1 - a)]) for a, b in zip(single, recall, strict=True)]


def total(curves, shares):
    return sum(curve[share] for curve, share in zip(curves, shares, strict=True))


@pytest.mark.parametrize("name", PUBLISHED["allocation_goldens"]["cases"])
def test_published_programme(name):
    golden = PUBLISHED["allocation_goldens"]["cases"][name]
    kind, slots = name.split("_")
    curves = published_curves(kind == "gate")
    assert total(curves, [int(slots) // 32] * 32) == pytest.approx(golden["uniform_loads"], abs=1e-9)
    if "ref_alloc" in golden:
        assert total(curves, golden["ref_alloc"]) == pytest.approx(golden["ref_loads"], abs=1e-9)
    for way in (allocate, _allocate_by_dynamic_programming):
        shares = way(curves, int(slots))
        assert sum(shares) == int(slots)
        assert total(curves, shares) == pytest.approx(golden["opt_k0_loads"], abs=1e-9)
    if golden["opt_k0_loads"] < golden["ref_loads"] - 1e-9:
        assert min(shares) == 0, "what the released programme cannot give"
    # The released programme starts every layer at one slot.
    from_one = allocate([curve[1:] for curve in curves], int(slots) - 32)
    assert total(curves, [share + 1 for share in from_one]) == pytest.approx(golden["ref_loads"], abs=1e-9)


curve = st.lists(st.floats(0, 10), min_size=1, max_size=5).map(lambda loads: np.array(sorted(loads, reverse=True)))


@given(st.lists(curve, min_size=1, max_size=4), st.data())
def test_brute_force(curves, data):
    most = sum(len(one) - 1 for one in curves)
    slots = data.draw(st.integers(0, most))
    best = min(
        total(curves, shares)
        for shares in itertools.product(*(range(len(one)) for one in curves))
        if sum(shares) == slots
    )
    shares = allocate(curves, slots)
    assert sum(shares) == slots and total(curves, shares) == pytest.approx(best, abs=1e-9)


@given(st.lists(curve.map(lambda loads: np.cumsum(np.sort(np.append(0, -loads)))), min_size=1, max_size=4), st.data())
def test_greedy_equals_the_programme_where_convex(curves, data):
    assert all(is_convex(one) for one in curves)
    slots = data.draw(st.integers(0, sum(len(one) - 1 for one in curves)))
    greedy, programme = _allocate_greedily(curves, slots), _allocate_by_dynamic_programming(curves, slots)
    assert total(curves, greedy) == pytest.approx(total(curves, programme), abs=1e-9)


@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("slots", [0, 2, 5, 8, 10])
def test_formula_against_chance(cap, slots):
    """Random residents, predictions that are right by rank, the first `cap` absent ones fetched."""
    experts, top_k, precision = 10, 3, [0.9, 0.6, 0.3]
    generator = np.random.default_rng(slots * 10 + cap)
    loads, rounds = 0, 40_000
    for _ in range(rounds):
        order = generator.permutation(experts)
        predicted, others = order[:top_k], order[top_k:]
        used = {int(expert) for expert, b in zip(predicted, precision, strict=True) if generator.random() < b}
        used |= {int(expert) for expert in others[: top_k - len(used)]}
        resident = set(generator.permutation(experts)[:slots].tolist())
        fetched = [int(expert) for expert in predicted if int(expert) not in resident][:cap]
        loads += len(used - resident - set(fetched))
    expected = expected_loads(experts, top_k, precision, cap)[slots]
    assert loads / rounds == pytest.approx(expected, abs=0.02)


def test_all_resident_or_none():
    curve = expected_loads(8, 2, [0.9, 0.9], max_experts=2)
    assert curve[8] == 0 and curve[0] == pytest.approx(2 - 1.8)


def test_stack_distances_of_single_experts_are_exactly_the_loads_of_lru():
    generator = np.random.default_rng(2)
    events = generator.zipf(1.5, 500) % 9
    distances = StackDistances(9)
    for expert in events.tolist():
        distances.record([expert])
    for slots in range(1, 10):
        pool = Residency(slots, 0, LRU(1, 9))
        loads = 0
        for expert in events.tolist():
            request = pool.request(0, [expert])
            for load in request.loads:
                pool.complete_load(load.key)
            pool.release(0, [expert])
            loads += len(request.loads)
        assert distances.misses[slots] == loads
    assert distances.misses[0] == 500


def test_floors_follow_the_traffic():
    """By traffic: equal at first, then to the layer whose experts change, and to the other when they do there."""
    shape = CacheShape([6, 6], 1, [0, 0], [1, 1])
    controller = CacheController(shape, CacheSetup([7], "lru", "trace"))
    link = VirtualLink(controller, Machine())
    pool = controller.pools[0]
    assert pool.floors.tolist() == [3, 3]
    for busy in (0, 1, 0):
        for step in range(4 * REVISION_STEPS):
            for layer in (0, 1):
                expert = step % 5 if layer == busy else 0
                link.submit(controller.begin(layer, [expert]))
                controller.release(layer, [expert])
        assert pool.floors[busy] == 5 and pool.floors.sum() == 6


def test_stack_distances_are_the_loads_of_lru():
    generator = np.random.default_rng(1)
    events = [sorted(generator.choice(6, 2, replace=False).tolist()) for _ in range(300)]
    distances = StackDistances(6)
    for event in events:
        distances.record(event)
    for slots in range(2, 7):
        pool = Residency(slots, 0, LRU(1, 6))
        loads = 0
        for event in events:
            request = pool.request(0, event)
            for load in request.loads:
                pool.complete_load(load.key)
            pool.release(0, event)
            loads += len(request.loads)
        # Experts of one event tie in the order of leaving, which the two may break differently.
        assert distances.misses[slots] == pytest.approx(loads, rel=0.08)
    assert (distances.misses[0] == 600 and distances.misses[6] == 6) or distances.misses[6] == 0


@pytest.mark.parametrize("convex", [True, False])
def test_large_models_take_no_time(convex):
    generator = np.random.default_rng(0)
    layers, experts = (200, 256) if convex else (200, 200)
    falls = generator.random((layers, experts))
    if convex:
        falls = -np.sort(-falls, axis=1)
    curves = [np.append(0, -np.cumsum(row)) + row.sum() for row in falls]
    # The yardstick: one pass of numpy over a row of totals for every expert, on the same machine in the same minute.
    totals = np.zeros(layers * experts // 2)
    start = time.process_time()
    for _ in range(layers * experts):
        np.add(totals, 1, out=totals)
    yardstick = time.process_time() - start
    start = time.process_time()
    shares = allocate(curves, layers * experts // 2)
    assert time.process_time() - start < 10 * yardstick
    assert sum(shares) == layers * experts // 2


def test_where_the_curves_do_not_care_shares_are_equal():
    """Without predictions, the closed form is a straight line: every split is as good as another."""
    assert allocate([expected_loads(8, 2.0)] * 5, 20) == [4] * 5
    assert sorted(allocate([expected_loads(8, 2.0)] * 5, 22)) == [4, 4, 4, 5, 5]
