"""Policies that only replays run: their scores, and that no server takes them."""

import numpy as np
import pytest

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.eviction import POLICIES
from vllm_adapmoe.simulate.baselines import LFRU, MRS, SIMULATED
from vllm_adapmoe.simulate.compare import PolicyName, run_simulate
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo, TraceWriter
from vllm_adapmoe.simulate.virtual_link import Machine


def victim(policy: LFRU | MRS, *among: tuple[int, int]) -> tuple[int, int]:
    return max(among, key=policy.wait_of)


def test_frequency_over_age():
    policy = LFRU(1, 4)
    for expert in (0, 0, 0, 0, 0, 1, 2):
        policy.record(0, np.array([expert]))
    assert victim(policy, (0, 0), (0, 1)) == (0, 1), "used once, if later"
    for _ in range(20):
        policy.record(0, np.array([2]))
    assert victim(policy, (0, 0), (0, 2)) == (0, 0), "used often, but long ago"


def test_recent_share():
    policy = MRS(2, 4)
    for _ in range(3):
        policy.record(0, np.array([0]))
    policy.record(1, np.array([0]))
    assert victim(policy, (0, 0), (1, 0)) == (1, 0)


def test_a_server_takes_the_policies_that_win_somewhere():
    for name in POLICIES.keys() - {"next_token"}:  # which needs a profile
        AdapMoEConfig(eviction=name)
    for name in SIMULATED.keys() - POLICIES.keys():
        assert PolicyName.parse(name).eviction == name
        with pytest.raises(
            AdapMoEError, match=f"eviction='{name}' is not usable: .* 'lru', 'next_use' or 'next_token'"
        ):
            AdapMoEConfig.parse({"eviction": name})


def test_a_comparison_replays_the_policy_that_it_names(tmp_path):
    """Two experts fit. Expert 0 is used most: frequency keeps it over the two that follow it, recency does not."""
    info = TraceInfo("a-model", [4], 1, 4, [9], [0])
    used = [0] * 8 + [1, 2, 0, 1, 2, 0, 3]
    steps = [Step(0.0, ["a"], np.zeros(1), np.full((1, 1, 1), one), np.ones((1, 1, 1)), {}) for one in used]
    writer = TraceWriter(tmp_path / "t", info, 1 << 20)
    for step in steps:
        writer.add(step)
    writer.close()
    compared = run_simulate(tmp_path / "t", [2], ["lru", "lfru"], Machine(), lookahead=1, max_experts=1, profile=None)
    lru, lfru = (point["demand_loads"] for point in compared["points"])
    assert lru == replay(info, steps, CacheSetup([2], "lru")).demand_loads
    assert lfru == replay(info, steps, CacheSetup([2]), eviction=LFRU).demand_loads < lru
