"""The kernel that decides on the GPU, in Triton's interpreter, against the controller that the CPU worker runs."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_adapmoe.device.claim import claim
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.device.residency import DeviceResidency, Loads
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy import expected_wait
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.chances import chance_of_any
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.expected_wait import EVENT, UNIT, fixed

CPU = torch.device("cpu")
ADDRESS = 1 << 20
"""Of the first record; the others follow, one byte each."""


class Pair:
    """A controller, and the kernel on a pool of the same slots, fed with the same steps."""

    def __init__(
        self, layers: int, experts: int, slots: int, eviction: str, max_experts: int, floors: list[int] | None
    ) -> None:
        self.experts, self.max_experts = experts, max_experts
        setup = CacheSetup([slots], eviction, max_experts=max_experts)
        self.controller = CacheController(CacheShape([experts] * layers, 2, [0] * layers, [64] * layers), setup)
        (self.pool,) = self.controller.pools
        self.pool.set_floors(floors)
        self.records = torch.arange(layers * experts).view(layers, experts) + ADDRESS
        self.device = DeviceResidency(self.pool, self.records, CPU)
        self.loads, self.routing = Loads(experts, CPU), DeferredRouting(layers, 8, 2, CPU)
        self.device.upload(self.pool, [])

    def event(self, layer: int, ids: Any, outputs: Any = None, ahead: Any = None, padded: int = 0) -> None:
        """An event of both; `outputs` of a next-token head, behind another column; the last `padded` rows are none."""
        ids = torch.as_tensor(ids)
        rows = len(ids) - padded
        self.routing.begin_step(rows)
        head = None if outputs is None else torch.nn.functional.pad(torch.from_numpy(outputs), (1, 0), value=9.0)
        kernel_ids = claim(
            self.device, self.loads, layer, Chosen(ids), self.routing, Predicted(head, 1, ahead),
            self.max_experts,
        )  # fmt: skip
        real = ids[:rows]
        assert self.routing.ids[layer, : len(ids)].tolist() == [*real.tolist(), *[[-1, -1]] * padded]
        assert kernel_ids.dtype == ids.dtype
        assert kernel_ids.tolist() == [*real.where(real >= 0, self.experts).tolist(), *[[self.experts] * 2] * padded]
        expected = None if outputs is None or not rows else chance_of_any(outputs[:rows])
        voted = None if ahead is None else ahead[:rows]
        votes = None if voted is None else torch.bincount(voted[voted >= 0], minlength=self.experts).numpy()
        needed = np.unique(real[real >= 0].numpy())
        decided = self.controller.decide_on_device(layer, needed, expected, votes)
        for kind, loads in enumerate(decided):
            count = int(self.loads.counts[kind])
            theirs = self.loads.entries[kind, :count].tolist()
            assert theirs == [[int(self.records[load.key]), load.slot] for load in loads], (layer, kind)

    def check(self) -> None:
        state, pool, stats = self.device.download(), self.pool, self.controller.stats
        assert np.array_equal(state.slots, pool.slots) and state.free == pool.free
        used = state.slots[state.slots >= 0].tolist() + state.free
        assert sorted(used) == list(range(pool.num_slots)), "no slot is lost or held twice"
        policy = pool.caught_up()
        assert np.array_equal(state.wait, policy.wait)
        best, wait = pool.best_victims()
        assert np.array_equal(self.device.best.numpy(), best)
        assert np.array_equal(self.device.best_wait.numpy()[best >= 0], wait[best >= 0])
        assert self.device.count.tolist() == pool.count
        counters = self.device.counters.tolist()
        assert counters[:4] == [stats.prefetches, stats.prefetch_hits, stats.prefetches_wasted, 0]
        assert counters[4::2] == self.controller.layer_hits and counters[5::2] == self.controller.layer_misses
        assert not self.device.slot_of[:, -1].add(1).any(), "dropped pairs have no row"


@pytest.mark.parametrize("eviction", ["lru", "next_use", "next_token"])
@settings(max_examples=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_decides_as_the_controller(eviction, data):
    """Random histories, ties included: few experts that are used alike, equal predictions, and all slots free."""
    layers, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 9))
    slots = data.draw(st.integers(experts, layers * experts + 1))
    floors = data.draw(st.none() | st.lists(st.integers(0, experts), min_size=layers, max_size=layers))
    pair = Pair(layers, experts, slots, eviction, data.draw(st.integers(0, 3)), floors)
    chance = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    for _ in range(data.draw(st.integers(1, 6))):
        tokens = int(chance.integers(1, 4))
        for layer in range(layers):
            ids = chance.integers(-1, experts, (tokens, 2), dtype=chance.choice([np.int32, np.int64]))
            outputs = chance.choice(np.array([-0.1, 0.0, 0.25, 0.3, 1.0], np.float32), (tokens, experts))
            ahead = torch.from_numpy(chance.integers(-1, experts, (tokens, 2)))
            pair.event(
                layer, ids, outputs if chance.random() < 0.7 else None,
                ahead if layer + 1 < layers and chance.random() < 0.7 else None, int(chance.integers(0, tokens)),
            )  # fmt: skip
        pair.check()


def test_hands_over_and_back():
    """Host and GPU in turns, as prompts and decode steps come: the same slots as with one of them alone."""
    chance = np.random.default_rng(3)
    pair, alone = (Pair(4, 8, 14, "next_use", 2, None) for _ in range(2))
    for step in range(12):
        if step % 3 == 0:
            state = pair.device.download()
            pair.pool.policy.adopt(state)
            assert pair.pool.adopt(state.slots, state.free) == []
            pair.device = DeviceResidency(pair.pool, pair.records, CPU)
            pair.device.upload(pair.pool, list(pair.controller.staged))
            pair.controller.stats = type(pair.controller.stats)()
            pair.controller.layer_hits, pair.controller.layer_misses = [0] * 4, [0] * 4
        for layer in range(4):
            ids, ahead = chance.integers(0, 8, (2, 2, 2), dtype=np.int32)
            for each in (pair, alone):
                each.event(layer, ids, None, torch.from_numpy(ahead) if layer < 3 else None)
        pair.check()
        alone.check()
    assert np.array_equal(pair.pool.slots, alone.pool.slots)


def test_experts_of_other_ranks_are_ignored():
    pair = Pair(2, 8, 8, "next_use", 2, None)
    pair.device.records[:, ::2] = 0
    everyone = torch.arange(8).view(4, 2)
    pair.routing.begin_step(4)
    claim(pair.device, pair.loads, 0, Chosen(everyone), pair.routing, Predicted(ahead=everyone), 8)
    assert pair.loads.counts.tolist() == [4, 4]
    assert (pair.device.slot_of[:, :8] >= 0).tolist() == [[False, True] * 4] * 2


def test_dropped_pairs_are_not_needed():
    """And the cost of dropping is recorded with what is kept."""
    pair = Pair(2, 8, 8, "next_use", 2, None)
    ids, keep = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[True, False], [True, True], [True, True]])
    cost = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    pair.routing.begin_step(2)
    assert claim(pair.device, pair.loads, 1, Chosen(ids, keep, cost), pair.routing).tolist() == [[0, 8], [2, 3], [8, 8]]
    assert pair.routing.ids[1, :3].tolist() == [[0, -1], [2, 3], [-1, -1]]
    assert pair.routing.costs[1, :4].tolist() == [0.1, 0.2, 0.3, 0.0]
    assert (pair.device.slot_of[1] >= 0).nonzero().flatten().tolist() == [0, 2, 3]
    assert pair.routing.ids[0].eq(-2).all() and not pair.routing.costs[0].any(), "the other layer's are its own"


def test_ids_of_smaller_layers():
    """Top-1, and fewer experts than other layers: recorded in the first column; dropped pairs get its own number."""
    pair = Pair(2, 8, 8, "next_use", 2, None)
    pair.routing.begin_step(2)
    ids = claim(pair.device, pair.loads, 1, Chosen(torch.tensor([[3], [-1]])), pair.routing, absent=4)
    assert ids.tolist() == [[3], [4]]
    assert pair.routing.ids[1, :3].tolist() == [[3, -2], [-1, -2], [-2, -2]]


def test_one_text_for_numbers_and_arrays():
    """Numba's numbers, numpy's and PyTorch's arrays: the same bits."""
    chance = np.random.default_rng(0)
    quick, slow, expected = chance.integers(0, UNIT + 1, (3, 1000))
    used = chance.integers(0, 2, 1000)
    speed, weight, floor, share = fixed(0.05), fixed(0.15), fixed(0.01), fixed(0.5)

    def wait(quick: Any, slow: Any, used: Any, expected: Any) -> Any:
        rate = expected_wait.next_rate(slow, used, speed, UNIT)
        use = expected_wait.use_chance(quick, rate, weight, floor, UNIT)
        return expected_wait.expected_wait(expected_wait.mixed_chance(use, expected, share, UNIT), 128, EVENT, UNIT)

    arrays = quick, slow, used, expected
    by_number = [wait(*(int(value) for value in values)) for values in zip(*arrays, strict=True)]
    assert wait(*arrays).tolist() == by_number
    assert wait(*(torch.from_numpy(array) for array in arrays)).tolist() == by_number
    assert min(by_number) >= 0 and max(by_number) < 1 << 40
