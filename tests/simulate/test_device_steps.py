"""Replays of steps that a GPU decides."""

import numpy as np
import pytest

from tests.simulate.test_replay import TILE, info, steps_of
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.gpu_state import fitting_tokens
from vllm_adapmoe.simulate.compare import run_simulate
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step, TraceWriter
from vllm_adapmoe.simulate.virtual_link import Machine

LINK = Machine(bandwidth=TILE, layer_seconds=1.5, step_seconds=0.25, latency=0.1)
AHEAD = CacheSetup([16], lookahead=1, max_experts=2)


def test_loads_and_prefetches_are_copied_at_once():
    """Two loads behind one latency; the next layer's two take longer than the layer that hides them."""
    steps = steps_of([[[0, 1], [2, 3]]], predict_experts=True)
    result = replay(info(2, 4, TILE), steps, AHEAD, LINK, device_tokens=1)
    assert result.demand_loads == result.stats["prefetches"] == result.stats["prefetch_hits"] == 2
    assert result.stats["stall_seconds"] == pytest.approx(2.1 + (2.1 - 1.5))
    assert result.seconds == pytest.approx(2.1 + 2.1 + 1.5 + 0.25)
    assert result.stats["fetch_seconds"] == pytest.approx(2 * 2.1)


def test_who_decides_a_step_goes_by_its_tokens():
    """A prompt of three rows between steps of one; what the host has in flight has arrived when the GPU decides."""
    token, prompt = steps_of([[[0, 1], [2, 3]], [[0, 1, 2, 3, 0], [2, 3, 0]]], predict_experts=True)
    results = [replay(info(2, 4, TILE), [token, prompt, token], AHEAD, LINK, device_tokens=most) for most in (0, 1, 3)]
    for result in results:
        assert result.stats["hits"] + result.stats["misses"] == 15 and result.stats["fetched_bytes"] == 7 * TILE
    assert [result.stats["late"] for result in results] == [1, 0, 0], "the first token's prefetch, by the host"
    assert len({result.seconds for result in results}) == 3, "the prompt's, too"


def test_the_gpu_uses_the_slots_that_the_host_sets_aside():
    """18 slots for 18 experts, two of them for the host's prefetches: it holds 16, and evicts two when it gets them."""
    setup = CacheSetup([18], lookahead=1, max_experts=2)
    round_of_all = steps_of([[[expert], [expert]] for expert in range(9)])
    prompt = steps_of([[[0, 1, 2], [0, 1, 2]]])
    by_host = replay(info(2, 9), round_of_all * 2, setup)
    by_gpu = replay(info(2, 9), round_of_all * 2, setup, device_tokens=1)
    in_turns = replay(info(2, 9), round_of_all + prompt + round_of_all, setup, device_tokens=1)
    assert by_gpu.demand_loads == 18 < in_turns.demand_loads < by_host.demand_loads


def test_the_hosts_plans_learn_nothing_of_them():
    """A worker's planner does not see them: how often its next prompt prefetches depends on its own steps."""
    controller = CacheController(info(2, 4).shape, AHEAD)
    controller.lend()
    for layer in (0, 1, 0, 1):
        controller.decide_on_device(layer, np.array([0]), None, None)
    controller.take_back()
    assert controller.planner is not None and controller.planner.missing == [1.0, 1.0]
    assert controller.begin(0, [0]).hits == 1
    assert controller.planner.missing[0] < 1


def test_steps_are_as_large_as_the_slots_allow():
    assert fitting_tokens([8, 8], [8, 8], 2, 64) == 64
    assert fitting_tokens([8, 8], [8, 7], 2, 64) == 3
    assert fitting_tokens([8, 8], [1, 7], 2, 64) == 0


def test_what_a_gpu_does_not_decide_is_refused(tmp_path):
    writer = TraceWriter(tmp_path / "t", info(2, 4), 1 << 20)
    writer.add(Step(0.0, ["a"], np.zeros(1), np.zeros((2, 1, 2), int), np.ones((2, 1, 2)), {}))
    writer.close()

    def run(policies: str, host: float | None = None) -> dict:
        return run_simulate(tmp_path / "t", [0.5], policies.split(","), Machine(), 1, 1, None, host, device_tokens=64)

    for policy in ("lru/trace", "mrs+prefetch"):
        with pytest.raises(AdapMoEError, match=f"--decode device does not run the policy '{policy}'".replace("+", ".")):
            run(f"lru,{policy}")
    with pytest.raises(AdapMoEError, match="leave out --host"):
        run("lru", host=0.5)
    assert run("lru,mrs,next_use+prefetch")["decode"] == "device"
