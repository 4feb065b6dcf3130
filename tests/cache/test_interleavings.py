"""The real manager, its reader threads and a packed file, driven through interleavings that Hypothesis chooses.

Every thread stops before each tile, before it begins a job and after it has moved one, until the test lets it pass. So
the order of all that happens is the test's, and a failure can be replayed and shrunk.
"""

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import vllm_adapmoe.store.file
from tests.cache.entries import entries
from tests.cache.gates import EXPERTS, FAULTS, KERNEL, LAYERS, Event, GatedStore, Gates, holds
from tests.store.test_stores import IDENTITY, pack
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.transfer import SPECULATORS, CacheClosed, Job
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import State
from vllm_adapmoe.policy.eviction import POLICIES
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.store.base import ExpertsUnavailable
from vllm_adapmoe.store.direct_io import read_full
from vllm_adapmoe.store.file import open_pack

TOP_K, PATIENCE = 2, 20.0
POOL_OF = [0, 0, 1]


@dataclass(frozen=True)
class Setup(CacheSetup):
    """An eighth of the slots would be too little speculation to see anything."""

    held: int = 0

    def staging(self, slots: int, num_experts: int) -> int:
        return min(self.held, slots - TOP_K)


SETUPS = st.tuples(
    st.sampled_from(sorted(POLICIES)), st.sampled_from(["pool", "uniform"]), st.sampled_from([2, 1, 3, 0])
)


class Interleavings(RuleBasedStateMachine):
    """One thread asks, readers read, and Hypothesis says who goes on."""

    path: Path
    stuck = False
    calm = 0

    @initialize(
        setup=SETUPS,
        slots=st.integers(TOP_K + 1, 8),
        readers=st.sampled_from([1, 2, 1, 4]),
        closed_midway=st.booleans(),
    )
    def build(self, setup, slots, readers, closed_midway):
        self.closed_midway = closed_midway
        self.gates = Gates()
        vllm_adapmoe.store.file.read_full = self.gates.read
        self.store = GatedStore(open_pack(self.path, IDENTITY), self.gates)
        self.slots, self.readers = [slots, 3], readers
        self.event: Event | None = None
        self.closer: threading.Thread | None = None
        self.cache = ExpertCacheManager(self.store, self.controller(*setup), torch.device("cpu"), readers)
        self.follow()

    def controller(self, eviction: str, allocation: str, held: int) -> CacheController:
        shape = CacheShape([EXPERTS] * len(LAYERS), TOP_K, POOL_OF, [layout.nbytes for layout in self.store.layouts])
        return CacheController(shape, Setup(self.slots, eviction, allocation, None, 2 if held else 0, 3, held))

    def follow(self) -> None:
        """Puts gates around the jobs of a new transfer engine."""
        self.transfers = self.cache.transfers
        self.asked = self.store.handed_out = 0
        self.speculation: set[threading.Thread] = set()
        """Whose job was not urgent when it was taken."""
        run, move, end = self.transfers.run, self.transfers._move, self.transfers._end

        def gated_run(job: Job) -> None:
            if not job.urgent:
                self.speculation.add(threading.current_thread())
            self.gates.wait(job.key)
            run(job)
            self.speculation.discard(threading.current_thread())

        def gated_move(job: Job, tiles: Iterator[int]) -> bool:
            try:
                return move(job, tiles)
            finally:
                self.gates.wait(job.key)

        def watched_end(job: Job, *result: Any) -> None:
            if job.key in self.store.broken and job.urgent and self.event is not None:
                self.event.broken.add(job.key[1])
            end(job, *result)

        self.transfers.run, self.transfers._move, self.transfers._end = gated_run, gated_move, watched_end

    # What may happen

    @precondition(lambda self: self.event is None)
    @rule(
        data=st.data(),
        layer=st.integers(0, 2),
        experts=st.sets(st.integers(0, EXPERTS - 1), min_size=1),
        aim=st.sampled_from(["wrong", "right", "any"]),
    )
    def acquire(self, data, layer, experts, aim):
        """Any experts, or such as prove right or wrong what speculation has begun."""
        begun = sorted(
            key for pool in self.cache.controller.pools for key, entry in pool.speculative.items() if entry.slot >= 0
        )
        if begun and aim != "any":
            layer, expert = data.draw(st.sampled_from(begun))
            experts = experts | {expert} if aim == "right" else experts - {expert} or {(expert + 1) % EXPERTS}
        group = sorted(experts)
        look = None
        if self.cache.controller.planner is not None:
            predicted = self.predict_experts(data, layer)
            ids = np.array([[group[0], group[-1] if len(group) > 1 else (group[0] + 1) % EXPERTS]])
            routing = ids, np.array([[True, len(group) > 1]])
            look = partial(self.cache.prefetch, layer, routing, predicted.get)
        self.event = Event(self.cache, self.gates, layer, group, look)
        self.event.start()
        self.settle()

    @precondition(lambda self: self.cache.controller.planner is not None)
    @precondition(lambda self: self.event is None or KERNEL in self.gates.waiting)
    @rule(data=st.data(), layer=st.integers(-1, 1))
    def prefetch(self, data, layer):
        self.cache.prefetch(layer, None, self.predict_experts(data, layer).get)
        self.settle()

    @precondition(lambda self: self.cache.controller.planner is not None and self.event is None)
    @rule(data=st.data(), prompt_tokens=st.sampled_from([0, 100]))
    def begin_step(self, data, prompt_tokens):
        """Of tokens alone, or with a prompt that sweeps over all layers."""
        chances = data.draw(st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS))
        self.cache.prefetch_first_layers(prompt_tokens, [np.array(chances)])
        self.settle()

    def predict_experts(self, data: st.DataObject, layer: int) -> dict[int, PredictedExperts]:
        """Right or wrong; of four rows, so that whatever they say is likely enough to be fetched."""
        result = {}
        for distance in range(1, min(2, len(LAYERS) - 1 - layer) + 1):
            ids = data.draw(st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True))
            result[distance] = PredictedExperts(np.array([ids] * 4), np.ones((4, TOP_K), dtype=bool))
        return result

    @precondition(lambda self: self.gates.waiting)
    @rule(data=st.data(), passes=st.integers(1, 6), how=st.sampled_from(sorted(FAULTS)))
    def advance(self, data, passes, how):
        """One thread goes on, past some gates; beyond the last of them its read may fail."""
        key = data.draw(st.sampled_from(sorted(self.gates.waiting)))
        for left in reversed(range(passes)):
            self.gates.let_pass(key, "go" if left else how)
            self.settle()
            if key not in self.gates.waiting:
                break

    @precondition(lambda self: self.gates.waiting)
    @rule(rounds=st.integers(1, 8) | st.just(8), all_of_them=st.sampled_from([False, True, False]))
    def several_advance(self, rounds, all_of_them):
        """Some gates each: everybody, or only what the event waits for."""
        for _ in range(rounds):
            needed = set() if self.event is None else {(self.event.layer, expert) for expert in self.event.group}
            for key in sorted(self.gates.waiting):
                if all_of_them or key in needed or key == KERNEL:
                    self.gates.let_pass(key)
            self.settle()

    @precondition(lambda self: self.calm > 10)  # or nothing gets anywhere
    @rule(what=st.sampled_from(["shares"] * 5 + ["restart"] * 2 + ["close"]), setup=SETUPS, data=st.data())
    def disturb(self, what, setup, data):
        self.calm = 0
        if what == "shares":
            shares = data.draw(st.none() | st.lists(st.integers(0, EXPERTS), min_size=3, max_size=3))
            with self.transfers.lock:
                for pool in self.cache.controller.pools:
                    pool.set_floors(shares)
        elif what == "close" and self.closer is None:
            self.close()
        elif what == "restart" and self.closer is None and self.event is None:
            self.gates.set_open(True)
            self.cache.restart(self.controller(*setup), None)
            self.gates.set_open(False)
            self.follow()

    def close(self) -> None:
        self.closer = threading.Thread(target=self.cache.close, name="closes", daemon=True)
        self.closer.start()
        self.settle()

    # Until nothing moves any more

    def settle(self) -> None:
        """Waits until every thread stands at a gate or has nothing to do, and sees that it stands rightly."""
        self.calm += 1
        deadline = time.monotonic() + PATIENCE
        while not self.settled():
            if time.monotonic() > deadline:
                self.stuck = True
                pytest.fail(f"a thread neither goes on nor waits for anything that comes:\n{dump()}")
            time.sleep(5e-5)
        if self.event is not None and not self.event.is_alive():
            self.ended(self.event)
            self.event = None

    def settled(self) -> bool:
        transfers, gates = self.transfers, self.gates
        with transfers.lock, gates.changed:
            threads = [thread for thread in (*transfers.threads, self.event) if thread and thread.is_alive()]
            standing = set() if gates.open else set(gates.waiting.values())
            resting = len(transfers.changed._waiters)  # type: ignore[attr-defined]
            if any(gates.passes.values()) or len(threads) != len(standing) + resting:
                return False
            if self.closer is not None and self.closer.is_alive():
                return not gates.open and any(thread.is_alive() for thread in transfers.threads)
            return True

    def ended(self, event: Event) -> None:
        """An event fails if and only if a read failed that it waited for, or everything ends."""
        if event.error is None:
            assert not event.broken, f"{event.broken} could not be read, and were served"
        elif self.closer is not None and isinstance(event.error, CacheClosed):
            assert str(event.error) == "the expert cache is closed"
        elif not isinstance(event.error, ExpertsUnavailable):
            raise event.error
        else:
            assert set(event.error.experts) == event.broken & set(event.group)
            assert "cannot read expert" in str(event.error)

    # What must hold whenever nothing moves

    @invariant()
    def one_slot_one_expert(self):
        for pool in self.cache.controller.pools:
            slots = [entry.slot for entry in entries(pool).values() if entry.slot >= 0] + pool.free
            assert sorted(slots) == list(range(pool.num_slots))

    @invariant()
    def what_is_there_is_whole(self):
        """Of every slot, pinned or not, that is said to hold an expert."""
        for pool in self.cache.controller.pools:
            for key, entry in entries(pool).items():
                if entry.state in (State.RESIDENT, State.STAGED):
                    assert holds(self.cache, entry.slot, key), (key, entry)

    @invariant()
    def only_what_is_held_is_pinned(self):
        held = set() if self.event is None else {(self.event.layer, expert) for expert in self.event.group}
        for pool in self.cache.controller.pools:
            pinned = {key: entry.pins for key, entry in entries(pool).items() if entry.pins}
            assert set(pinned.values()) <= {1}
            assert pinned.keys() <= held
            if KERNEL in self.gates.waiting and pool is self.cache.controller.residency(self.event.layer):
                assert pinned.keys() == held
                assert not pool.evictable[tuple(zip(*held, strict=True))].any()

    @invariant()
    def maps_name_what_is_resident(self):
        coming = set()  # a layer's map follows when all that it waits for has come
        if self.event is not None and KERNEL not in self.gates.waiting:
            coming = {(self.event.layer, expert) for expert in self.event.group}
        for layer, (slot_map, there) in enumerate(zip(self.cache.slot_maps, self.cache.resident(), strict=True)):
            assert there[: len(slot_map)].tolist() == (slot_map >= 0).tolist()
            for expert, slot in enumerate(slot_map.tolist()):
                entry = entries(self.cache.controller.residency(layer)).get((layer, expert))
                resident = entry is not None and entry.state is State.RESIDENT
                assert slot == (entry.slot if resident else -1) or (slot == -1 and (layer, expert) in coming)

    @invariant()
    def bytes_add_up(self):
        transfers, stats = self.transfers, self.cache.stats
        under_way = sum(job.moved for job in transfers.jobs.values())
        assert stats.fetched_bytes + under_way == self.store.handed_out
        here = sum(
            self.store.layouts[key[0]].nbytes
            for pool in self.cache.controller.pools
            for key, entry in entries(pool).items()
            if entry.state in (State.RESIDENT, State.STAGED)
        )
        assert 0 <= stats.wasted_bytes <= stats.fetched_bytes - here

    @invariant()
    def queues_are_in_order(self):
        transfers = self.transfers
        jobs = list(transfers.jobs.values())
        loading = {
            key
            for pool in self.cache.controller.pools
            for key, entry in entries(pool).items()
            if entry.state is State.LOADING
        }
        assert loading == transfers.jobs.keys()
        assert transfers.demanding == sum(job.urgent for job in jobs)
        at_work = {key for key in self.gates.waiting if key != KERNEL}
        assert transfers.speculating == len(self.speculation) <= SPECULATORS
        if self.event is None:
            assert not transfers.errors
        if not transfers.closing:
            queued = {id(job) for job in (*transfers.urgent, *transfers.speculative)}
            assert {job.key for job in jobs if id(job) not in queued} == at_work
            idle = self.readers - sum(thread in transfers.threads for thread in self.gates.waiting.values())
            resting = len(transfers.changed._waiters)
            assert not (transfers.urgent and resting), "somebody should have taken it"
            may_start = transfers.speculative and not transfers.demanding and transfers.speculating < SPECULATORS
            assert not (may_start and idle), "a reader should have taken it"

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        try:
            if not self.stuck:
                if self.closed_midway and self.closer is None:
                    self.close()
                self.gates.set_open(True)
                self.finish()
        finally:
            self.gates.set_open(True)
            vllm_adapmoe.store.file.read_full = read_full

    def finish(self) -> None:
        """Everything goes on: what is under way ends, every expert is served, and no thread is left."""
        self.settle()
        assert self.event is None, f"it waits for what nobody will bring\n{dump()}"
        if self.closer is None:
            for layer in range(len(LAYERS)):
                self.serve(layer)
                assert self.event is None
            transfers = self.transfers
            assert not (transfers.jobs or transfers.errors or transfers.demanding or transfers.speculating)
            self.close()
        assert self.closer is not None
        self.closer.join(PATIENCE)
        assert not any(thread.is_alive() for thread in (self.closer, *self.transfers.threads)), dump()
        assert not self.transfers.jobs
        late = self.serve(0)
        assert self.event is None
        assert isinstance(late.error, CacheClosed)

    def serve(self, layer: int) -> Event:
        """All experts of a layer, nothing in the way."""
        event = self.event = Event(self.cache, self.gates, layer, list(range(EXPERTS)), None)
        event.start()
        self.settle()
        return event


def dump() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame)[-6:])}"
        for ident, frame in sys._current_frames().items()
    )


def test_interleavings(tmp_path):
    machine = type("Interleavings", (Interleavings,), {"path": tmp_path / "experts.pack"})
    pack(machine.path, LAYERS).close()
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=50, deadline=None))
