"""Which decoding requests a step leaves out, and that nobody starves of it."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cache.entries import entries
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.prefetch.request_experts import bits
from vllm_adapmoe.scheduling.affinity import DecodingRequest, held_back
from vllm_adapmoe.simulate.replay import Machine, VirtualLink


def hold(*decoding: DecodingRequest, resident: int, slots: int, compute=1.0, load=1.0, max_delay=10.0) -> set[str]:
    return held_back(decoding, resident, slots, compute, load, max_delay)


A, B = 0b0000_1111, 0b1111_0000


def test_waits_while_others_experts_are_there():
    requests = [DecodingRequest("a", A, 0.0), DecodingRequest("b", B, 0.0), DecodingRequest("c", A, 0.0)]
    assert hold(*requests, resident=A, slots=4) == {"b"}
    assert hold(*requests, resident=B, slots=4) == {"a", "c"}


def test_nobody_waits_where_everything_fits():
    assert hold(DecodingRequest("a", A, 0.0), DecodingRequest("b", B, 0.0), resident=A, slots=8) == set()


def test_nobody_waits_where_the_batch_shares_its_loads():
    """Everybody wants something else that is missing: one sweep serves all."""
    requests = [DecodingRequest(str(number), 0xFFFF & ~(1 << number), 0.0) for number in range(16)]
    assert hold(*requests, resident=0xFF, slots=8) == set()


def test_who_has_waited_long_enough_runs():
    requests = [DecodingRequest("a", A, 0.0), DecodingRequest("b", B, 10.0)]
    assert "b" not in hold(*requests, resident=A, slots=4)
    assert "new" not in hold(
        *requests[:1], DecodingRequest("new", None, 0.0), DecodingRequest("b", B, 0.0), resident=A, slots=4
    )


def test_the_more_urgent_never_waits_for_the_less_urgent():
    requests = [DecodingRequest("a", A, 0.0, priority=1), DecodingRequest("b", B, 0.0, priority=0)]
    assert hold(*requests, resident=A, slots=4) == set()  # else it would be b, and a with it costs no more


@given(
    masks=st.lists(st.integers(0, 2**16 - 1) | st.none(), min_size=1, max_size=12),
    waits=st.lists(st.floats(0, 2), min_size=12, max_size=12),
    resident=st.integers(0, 2**16 - 1),
    slots=st.integers(1, 16),
)
def test_somebody_always_runs(masks, waits, resident, slots):
    requests = [DecodingRequest(str(number), mask, waits[number]) for number, mask in enumerate(masks)]
    held = hold(*requests, resident=resident, slots=slots, max_delay=1.0)
    assert len(held) < len(requests)
    assert not any(one.name in held for one in requests if one.waited >= 1.0 or one.expected is None)


LAYERS, EXPERTS, TOP_K, SLOTS = 4, 16, 2, 40
LOAD, COMPUTE = 1e-3, 2e-3
"""Seconds of one load, and of a step."""


def serve(max_delay: float, classes: list[int | None], steps: int = 2000):
    """Requests of classes that use different halves of every layer's experts (None: all of them), too many for the
    slots together.

    The cache is the worker's own, on a virtual link. Returns seconds per token, and by request the longest time
    between two of its tokens, both after a warm-up.
    """
    shape = CacheShape([EXPERTS] * LAYERS, TOP_K, [0] * LAYERS, [1000] * LAYERS)
    controller = CacheController(shape, CacheSetup([SLOTS], "next_use"))
    link = VirtualLink(controller, Machine(1000 / LOAD))
    chance = random.Random(0)
    now, tokens, begun = 0.0, 0, 0.0
    last, longest = [0.0] * len(classes), [0.0] * len(classes)
    half = EXPERTS // 2

    def draw(kind: int | None) -> np.ndarray:
        experts = np.zeros((LAYERS, EXPERTS), dtype=bool)
        among = range(EXPERTS) if kind is None else range(kind * half, (kind + 1) * half)
        for layer in range(LAYERS):
            experts[layer, chance.sample(among, TOP_K)] = True
        return experts

    for step in range(steps):
        if step == steps // 4:
            begun, tokens = now, 0
            longest = [0.0] * len(classes)
        wanted = [draw(kind) for kind in classes]
        resident = np.zeros((LAYERS, EXPERTS), dtype=bool)
        for key, entry in entries(controller.pools[0]).items():
            resident[key] = entry.slot >= 0
        decoding = [DecodingRequest(str(index), bits(one), now - last[index]) for index, one in enumerate(wanted)]
        held = held_back(decoding, bits(resident), SLOTS, COMPUTE, LOAD, max_delay)
        running = [index for index in range(len(classes)) if str(index) not in held]
        for layer in range(LAYERS):
            experts = np.flatnonzero(np.any([wanted[index][layer] for index in running], axis=0)).tolist()
            request = controller.begin(layer, experts)
            link.submit(request)
            link.now = now
            link.run(now, [load.key for load in request.loads])
            now = link.now + COMPUTE / LAYERS
            controller.release(layer, experts)
        for index in running:
            longest[index] = max(longest[index], now - last[index])
            last[index] = now
        tokens += len(running)
    return (now - begun) / tokens, longest


def test_affinity_saves_loads_and_the_age_bound_holds():
    """A rare class against a common one: without the bound the common one's experts would stay for ever."""
    classes = [0] * 8 + [1] * 2
    plain, _ = serve(0.0, classes)
    kept, longest = serve(0.05, classes)
    assert kept < 0.85 * plain
    # Whoever is due at a step's end runs in the next one.
    longest_step = COMPUTE + LOAD * LAYERS * EXPERTS
    assert max(longest) <= 0.05 + 2 * longest_step
    assert max(longest[8:]) > 0.05 * 0.9, "the rare class was never held: nothing was tried"


@pytest.mark.parametrize("requests", [4, 8, 12])
def test_nobody_is_held_for_nothing(requests):
    """One kind of requests: what is not fetched for one now is fetched for it later."""
    plain, _ = serve(0.0, [None] * requests)
    kept, _ = serve(0.05, [None] * requests)
    assert kept <= 1.01 * plain


@pytest.mark.parametrize("max_delay", [0.02, 0.1])
def test_longer_delays_are_bounded_too(max_delay):
    _, longest = serve(max_delay, [0] * 12 + [1])
    assert max(longest) <= max_delay + 2 * (COMPUTE + LOAD * LAYERS * EXPERTS)
