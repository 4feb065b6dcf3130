"""Replays: Belady against brute force, no policy below the bound, and the virtual clock against arithmetic."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.policy.tiles import MIN_TILE_BYTES, SPECULATIVE_TILE_SECONDS, TILE_BYTES, tile_bytes
from vllm_adapmoe.simulate.baselines import SIMULATED
from vllm_adapmoe.simulate.replay import belady, replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo
from vllm_adapmoe.simulate.virtual_link import Machine

TILE = TILE_BYTES


def info(layers: int, experts: int, nbytes: int = 1) -> TraceInfo:
    return TraceInfo("m", [experts] * layers, 2, 2, [nbytes] * layers, [0] * layers)


def steps_of(events: list[list[list[int]]], predict_experts: bool = False) -> list[Step]:
    """Steps with one row for each pair of experts: `events[step][layer]`, each padded to the step's longest."""
    steps = []
    for layers in events:
        rows = max((len(experts) + 1) // 2 for experts in layers)
        ids = np.zeros((len(layers), rows, 2), dtype=np.int64)
        weights = np.zeros((len(layers), rows, 2), dtype=np.float16)
        for layer, experts in enumerate(layers):
            ids[layer].ravel()[: len(experts)] = experts
            weights[layer].ravel()[: len(experts)] = 1
        predicted = {
            (layer, distance): PredictedExperts(ids[layer + distance], weights[layer + distance] > 0)
            for layer in range(len(layers))
            for distance in (1, 2)
            if predict_experts and layer + distance < len(layers)
        }
        steps.append(Step(0.0, ["r"] * rows, np.arange(rows, dtype=np.int32), ids, weights, predicted))
    return steps


def drawn(layers: int, experts: int):
    event = st.sets(st.integers(0, experts - 1), min_size=1, max_size=3).map(sorted)
    return st.lists(st.lists(event, min_size=layers, max_size=layers), min_size=1, max_size=4)


def fewest_loads(events: list[tuple[int, tuple[int, ...]]], slots: int) -> int:
    """Of every cache there is, by trying them: what stays after an event is any subset that leaves it room."""

    @functools.cache
    def best(number: int, resident: frozenset) -> int:
        if number == len(events):
            return 0
        layer, experts = events[number]
        wanted = frozenset((layer, expert) for expert in experts)
        missing = len(wanted - resident)
        others = sorted(resident - wanted)
        room = slots - len(wanted)
        if len(others) <= room:
            return missing + best(number + 1, wanted | resident)
        found = 10**9
        for mask in range(1 << len(others)):
            kept = frozenset(other for index, other in enumerate(others) if mask >> index & 1)
            if len(kept) == room:
                found = min(found, best(number + 1, wanted | kept))
        return missing + found

    return best(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(drawn(2, 3), st.integers(3, 5))
def test_the_oracle_is_the_best_there_is(events, slots):
    trace = info(2, 3)
    flat = [(layer, tuple(experts)) for step in events for layer, experts in enumerate(step)]
    assert belady(trace, steps_of(events), [slots]).sum() == fewest_loads(flat, slots)


@settings(max_examples=60, deadline=None)
@given(
    drawn(3, 6), st.integers(3, 12), st.sampled_from(sorted(SIMULATED)), st.sampled_from(["pool", "uniform", "trace"])
)
def test_no_policy_beats_the_bounds_on_bytes(events, slots, eviction, allocation):
    trace, steps = info(3, 6, nbytes=7), steps_of(events)
    oracle, bound = (int(belady(trace, steps, [slots], atomic).sum()) for atomic in (True, False))
    assert bound <= oracle
    result = replay(trace, steps, CacheSetup([slots], eviction, allocation), eviction=SIMULATED[eviction])
    assert result.demand_loads >= oracle
    assert result.stats["fetched_bytes"] == 7 * result.demand_loads
    assert result.stats["hits"] + result.stats["misses"] == sum(len(experts) for step in events for experts in step)


def test_time_is_what_arithmetic_says():
    """Two layers, everything missing in the first step, everything there in the second."""
    events = [[[0, 1], [2, 3]]] * 2
    machine = Machine(bandwidth=4 * TILE, layer_seconds=0.1, step_seconds=0.05, latency=0.01)
    result = replay(info(2, 4, 2 * TILE), steps_of(events), CacheSetup([8]), machine)
    load = 0.5 + 0.01
    assert result.demand_loads == 4
    assert result.seconds == pytest.approx(4 * load + 4 * 0.1 + 2 * 0.05)
    assert result.stats["stall_seconds"] == pytest.approx(4 * load)


def test_a_prefetch_hides_what_the_layers_before_take():
    """The second layer's expert starts on its way when the first layer begins, 0.3 s before it is asked for."""
    events = [[[0], [1]]]
    setup = CacheSetup([16], lookahead=1, max_experts=1)
    machine = Machine(bandwidth=2 * TILE, layer_seconds=0.3)
    result = replay(info(2, 4, TILE), steps_of(events, predict_experts=True), setup, machine)
    assert (result.demand_loads, result.stats["late"], result.stats["prefetches"]) == (1, 1, 1)
    assert result.seconds == pytest.approx(0.5 + 0.5 + 0.3)  # load, then the second load from the start of layer 0
    slow = Machine(bandwidth=2 * TILE, layer_seconds=0.6)
    result = replay(info(2, 4, TILE), steps_of(events, predict_experts=True), setup, slow)
    assert (result.demand_loads, result.stats["late"], result.stats["prefetch_hits"]) == (1, 0, 1)
    assert result.seconds == pytest.approx(0.5 + 0.6 + 0.6)


def test_demand_overtakes_speculation_between_tiles():
    """Layer 1 is predicted 3 and asks 2: it waits for the tile under way, then for its own load."""
    steps = steps_of([[[0], [2]]])
    steps[0].predicted[0, 1] = PredictedExperts(np.array([[3, 0]]), np.array([[True, False]]))
    setup = CacheSetup([16], lookahead=1, max_experts=1)
    machine = Machine(bandwidth=16 * MIN_TILE_BYTES, layer_seconds=1.53)  # 16 tiles a second
    result = replay(info(2, 4, 4 * TILE), steps, setup, machine)
    moved = 25 / 16  # the 25th tile has begun when layer 1 asks
    assert result.seconds == pytest.approx(4 + moved + 4 + 1.53)
    assert result.stats["wasted_bytes"] == 25 * MIN_TILE_BYTES  # cancelled at its end: its layer has come
    assert (result.stats["prefetches_cancelled"], result.stats["prefetches_wasted"]) == (1, 0)


def test_speculation_keeps_demand_waiting_no_longer_than_a_quarter_of_a_millisecond():
    record = 40 << 20
    assert tile_bytes(record, urgent=True, bandwidth=1e9) == tile_bytes(record, False, 25e9) == TILE_BYTES
    assert tile_bytes(record, urgent=False, bandwidth=1e9) == pytest.approx(1e9 * SPECULATIVE_TILE_SECONDS, rel=0.02)
    assert tile_bytes(record, urgent=False, bandwidth=1e9) % 4096 == 0, "for direct I/O"
    assert tile_bytes(record, urgent=False, bandwidth=1.0) == MIN_TILE_BYTES
    assert tile_bytes(record, urgent=False, bandwidth=None) == record // 16, "or that much of what demand takes itself"
    assert tile_bytes(1 << 20, urgent=False, bandwidth=None) == TILE_BYTES


def test_what_is_not_in_host_memory_takes_the_disks_time():
    """Three experts take turns in one slot pair: all fetches of the first turn read the disk, later ones do not."""
    trace = info(1, 3, nbytes=4 * TILE)
    steps = steps_of([[[expert % 3, (expert + 1) % 3]] for expert in range(6)])
    setup = CacheSetup([2], "lru")
    link = Machine(bandwidth=4 * TILE)
    everything = replay(trace, steps, setup, link)
    in_host = Machine(bandwidth=4 * TILE, host_records=3, disk_bandwidth=2 * TILE)
    tiered = replay(trace, steps, setup, in_host)
    assert everything.stats["host_hits"] == everything.stats["host_misses"] == 0
    assert tiered.demand_loads == everything.demand_loads == 7
    assert (tiered.stats["host_hits"], tiered.stats["host_misses"]) == (4, 3)
    assert everything.seconds == pytest.approx(7) and tiered.seconds == pytest.approx(4 + 2 * 3)
    none = Machine(bandwidth=4 * TILE, host_records=0, disk_bandwidth=2 * TILE)
    assert replay(trace, steps, setup, none).seconds == pytest.approx(2 * 7)
