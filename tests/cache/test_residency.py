"""The state machine of a pool, driven through random interleavings."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.cache.entries import entries
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import State, waves
from vllm_adapmoe.policy.eviction import LRU, POLICIES, NextToken, NextUse
from vllm_adapmoe.policy.residency import Residency

LAYERS, EXPERTS, BYTES = 3, 4, 10


class Interleavings(RuleBasedStateMachine):
    """A controller whose transfers end in any order, late, wrong or not at all."""

    keys = Bundle("keys")

    @initialize(
        slots=st.integers(3, 14),
        eviction=st.sampled_from(sorted(POLICIES)),
        max_experts=st.integers(0, 3),
        data=st.data(),
    )
    def build(self, slots, eviction, max_experts, data):
        self.setup = CacheSetup([slots], eviction, None, 1 if max_experts else 0, max_experts)
        self.controller = CacheController(CacheShape([EXPERTS] * LAYERS, 2, [0] * LAYERS, [BYTES] * LAYERS), self.setup)
        if max_experts:  # the default is an eighth of the slots: too few here to see anything
            staging = min(max_experts, slots - 2)
            policy = POLICIES[eviction](LAYERS, EXPERTS)
            self.controller.pools[0] = Residency(slots, staging, policy)
        self.pool = self.controller.pools[0]
        self.under_way: dict[tuple[int, int], int] = {}
        """Transfers, and the slot that each writes to."""
        self.content: dict[int, tuple[int, int]] = {}
        """What was last written whole into each slot."""
        self.queue: list[tuple[int, int]] = []
        self.held: list[tuple[int, list[int], dict[int, int]]] = []
        self.moved = self.spoilt = self.settled = 0

    # What may happen

    @precondition(lambda self: not self.held)
    @rule(layer=st.integers(0, LAYERS - 1), chosen=st.sets(st.integers(0, EXPERTS - 1), min_size=1))
    def acquire(self, layer, chosen):
        """One event, wave by wave but the last, which stays pinned."""
        groups = waves(sorted(chosen), self.pool.capacity)
        for number, group in enumerate(groups):
            before = {entry.slot for entry in entries(self.pool).values() if entry.pins}
            request = self.controller.begin(layer, group, sorted(chosen))
            assert all(load.key in self.under_way for load in request.awaited)
            for load in request.loads:
                assert load.slot not in self.under_way.values()
                self.under_way[load.key] = load.slot
            for load in (*request.loads, *request.promoted, *request.awaited):
                assert load.slot not in before, "a pinned slot was given away"
            waiting = [load.key for load in (*request.loads, *request.awaited)]
            asked = request.hits + len(request.promoted) + len(waiting)
            assert asked == len(group)
            if number < len(groups) - 1:
                for key in waiting:
                    self.end(key, True)
                self.check_served(layer, group)
                self.controller.release(layer, group)
            else:
                self.held.append((layer, list(group), {}))

    @precondition(lambda self: self.held)
    @rule(fails=st.booleans())
    def finish(self, fails):
        """Everything the event waits for ends, and so does the event."""
        layer, group, _ = self.held.pop()
        failed = False
        for expert in group:
            if (layer, expert) in self.under_way:
                failed |= fails
                self.end((layer, expert), not fails)
        if not failed:
            self.check_served(layer, group)
        self.controller.release(layer, group)

    @rule(key=st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), sure=st.booleans())
    def prefetch(self, key, sure):
        if self.pool.staging and self.pool.request_prefetch(key, sure):
            self.queue.append(key)

    @precondition(lambda self: not self.held and not self.under_way)
    @rule()
    def hand_over_and_back(self):
        """A GPU takes the cache, decides nothing, and gives it back."""
        self.queue.clear()
        self.settled += len(self.controller.settle())
        assert not self.pool.entries
        slots = self.pool.slots.copy()
        evicted = self.pool.adopt(slots, self.pool.free)
        assert len(evicted) == max(0, (slots >= 0).sum() - self.pool.capacity)

    @precondition(lambda self: self.queue)
    @rule()
    def start(self):
        key = self.queue.pop(0)
        pinned = {entry.slot for entry in entries(self.pool).values() if entry.pins}
        resident = {key for key, entry in entries(self.pool).items() if not entry.speculative}
        entry = entries(self.pool).get(key)
        sure = entry is not None and entry.near_certain
        load = self.controller.start_speculation(key)
        if load is not None:
            assert load.slot not in pinned and (sure or load.evicted not in resident)
            assert load.slot not in self.under_way.values()
            self.under_way[key] = load.slot
            self.content.pop(load.slot, None)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), complete=st.booleans())
    def transfer(self, data, complete):
        """Any transfer ends; one that was cancelled may end whole all the same."""
        key = data.draw(st.sampled_from(sorted(self.under_way)))
        held = any(key[0] == layer and key[1] in group for layer, group, _ in self.held)
        self.end(key, complete or (held and not entries(self.pool)[key].speculative))

    @rule(shares=st.one_of(st.none(), st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS)))
    def reallocate(self, shares):
        self.pool.set_floors(shares)

    def end(self, key, complete):
        if key not in self.under_way:
            return
        slot = self.under_way.pop(key)
        self.moved += BYTES if complete else 3
        entry = entries(self.pool)[key]
        self.spoilt += not complete and entry.speculative and not entry.cancelled
        if complete:
            self.content[slot] = key
        else:
            self.content.pop(slot, None)
        self.controller.transfer_ended(key, BYTES if complete else 3, complete)

    def check_served(self, layer, group):
        for expert in group:
            entry = entries(self.pool)[layer, expert]
            assert entry.state is State.RESIDENT and entry.pins == 1
            assert self.content[entry.slot] == (layer, expert), "the kernel would run another expert's weights"

    # What must hold after each

    @invariant()
    def one_expert_a_slot(self):
        slots = [entry.slot for entry in entries(self.pool).values() if entry.slot >= 0] + self.pool.free
        assert sorted(slots) == list(range(self.pool.num_slots))

    @invariant()
    def counts_add_up(self):
        states = Counter(
            "speculative" if entry.speculative and entry.slot >= 0 else entry.state
            for entry in entries(self.pool).values()
        )
        most = max(self.pool.staging, self.pool.max_speculating)
        assert self.pool.speculating == states["speculative"] <= most
        residents = [key for key, entry in entries(self.pool).items() if not entry.speculative]
        assert self.pool.residents == len(residents) <= self.pool.capacity
        assert self.pool.count == [sum(key[0] == layer for key in residents) for layer in range(LAYERS)]
        loading = {key for key, entry in entries(self.pool).items() if entry.state is State.LOADING}
        assert loading == set(self.under_way)
        evictable = {
            key for key, entry in entries(self.pool).items() if entry.state is State.RESIDENT and not entry.pins
        }
        assert {tuple(key) for key in np.argwhere(self.pool.evictable).tolist()} == evictable

    @invariant()
    def bytes_add_up(self):
        stats = self.controller.stats
        assert stats.fetched_bytes == self.moved
        assert 0 <= stats.wasted_bytes <= self.moved
        assert stats.late <= stats.misses
        assert stats.prefetch_hits <= stats.hits
        assert sum(self.controller.layer_hits) == stats.hits and sum(self.controller.layer_misses) == stats.misses
        # What became of every prefetch; a miss on another event's load counts as late as well.
        ended = stats.prefetch_hits + stats.prefetches_wasted + stats.prefetches_cancelled + self.spoilt
        ended += self.settled
        assert 0 <= stats.prefetches - ended - self.pool.speculating <= stats.late


TestInterleavings = Interleavings.TestCase


def residents(pool: Residency) -> set[tuple[int, int]]:
    return {key for key, entry in entries(pool).items() if entry.state is State.RESIDENT}


def ask(pool: Residency, layer: int, *experts: int, expected: np.ndarray | None = None) -> list[tuple[int, int] | None]:
    """One event, served at once; returns who left."""
    request = pool.request(layer, experts, expected=expected)
    for load in request.loads:
        pool.complete_load(load.key)
    pool.release(layer, experts)
    return [load.evicted for load in (*request.loads, *request.promoted) if load.evicted]


def test_least_recently_used_leaves():
    pool = Residency(3, 0, LRU(2, 4))
    ask(pool, 0, 0, 1)
    ask(pool, 1, 0)
    ask(pool, 0, 0)
    assert ask(pool, 1, 1) == [(0, 1)]
    assert residents(pool) == {(0, 0), (1, 0), (1, 1)}


def test_next_use_of_a_sweep():
    """Layers come in turn, each with all its experts: what was just used is what is needed last."""
    layers = 6
    pool = Residency(layers, 0, NextUse(layers, 2))
    loads = 0
    for number in range(20 * layers):
        request = pool.request(number % layers, [0, 1])
        loads += len(request.loads) if number >= layers else 0
        for load in request.loads:
            pool.complete_load(load.key)
        pool.release(number % layers, [0, 1])
    assert loads == pytest.approx(19 * layers, rel=0.25), "half of them; least recently used would load every one"


def test_who_is_expected_stays():
    """Both experts were used alike; the layer's input says which of them its next token wants."""
    for wanted in (0, 1):
        pool = Residency(2, 0, NextToken(1, 4))
        ask(pool, 0, 0, 1)
        chances = np.full(4, 0.01, dtype=np.float32)
        chances[wanted] = 0.9
        assert ask(pool, 0, 2, expected=chances) == [(0, 1 - wanted)]


def test_what_was_expected_once_is_forgotten():
    policy, history = NextToken(1, 3), NextUse(1, 3)
    for expected in (np.array([0.9, 0.0, 0.0], dtype=np.float32), None):
        policy.record(0, np.array([1]), expected)
        history.record(0, np.array([1]))
    assert np.array_equal(policy.wait, history.wait)


def test_a_share_is_a_floor():
    pool = Residency(5, 0, LRU(2, 4), floors=[2, 1])
    ask(pool, 0, 0, 1)
    for expert in range(4):
        ask(pool, 1, expert)
    assert {(0, 0), (0, 1)} <= residents(pool), "the least recently used, but its layer has no more than its share"
    pool.set_floors([0, 4])
    ask(pool, 0, 0)
    assert ask(pool, 1, 0) == [(0, 1)], "traffic has moved, and the floor with it"


def test_no_share_streams_through():
    pool = Residency(4, 0, LRU(2, 4), floors=[2, 0])
    ask(pool, 0, 0, 1)
    for expert in range(4):
        ask(pool, 1, expert, (expert + 1) % 4)
    assert {(0, 0), (0, 1)} <= residents(pool)


def test_too_many_pinned():
    pool = Residency(2, 0, LRU(2, 4))
    pool.request(0, [0, 1])
    with pytest.raises(LookupError, match="is pinned"):
        pool.request(1, [0])


def test_waves_are_those_of_the_routing():
    assert waves([1, 3, 4, 6, 7], 2) == [[1, 3], [4, 6], [7]]
    assert waves([], 2) == []
