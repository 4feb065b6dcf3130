"""What a worker did is what a replay of its trace does: the same decisions, counted in both."""

import os
from typing import Any

import pytest
from conftest import ROOT, TINY_MIXTRAL

from tests.integration.scenarios import ENGINE_ARGS, answers, greedy, prompts
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace_file import read_trace

pytestmark = pytest.mark.engine


def _reader_cores(worker: Any) -> list[set[int]]:
    return [os.sched_getaffinity(thread.native_id) for thread in worker.expert_cache.transfers.threads]


def end_readers(worker: Any) -> None:
    """From here on the thread that asks moves everything itself, in the order of asking: time is taken out."""
    transfers = worker.expert_cache.transfers
    transfers.close()
    transfers.threads.clear()
    transfers.closing = False


@pytest.mark.parametrize(
    ("slots", "config"),
    [
        (48, {}),
        (80, {"prefetch": {"lookahead": 8, "max_experts": 2}, "eviction": "lru"}),
        (48, {"allocation": "trace", "eviction": "lru"}),
        (48, {"profile": str(ROOT / "configs" / "tiny_mixtral.json")}),
    ],
    ids=["defaults", "eight ahead, lru", "lru, floors by traffic", "next-token heads"],
)
def test_worker_and_replay_agree(tmp_path, slots, config):
    asked = prompts(16, 2048, seed=11)
    config = {"cache_experts": slots, "store": "file", "trace_out": str(tmp_path / "trace")} | config
    with Engine(TINY_MIXTRAL, config, enforce_eager=True, **ENGINE_ARGS) as running:
        (cores,) = running.llm.collective_rpc(_reader_cores)
        assert cores and all(one == os.sched_getaffinity(0) for one in cores), "bound to the core of the kernels"
        running.llm.collective_rpc(end_readers)
        for batch in (asked[:1], asked[1:9], asked, asked[3:6]):
            answers(running, batch, greedy())
        counted = running.cache_stats()
    info, steps = read_trace(tmp_path / "trace")
    prefetch = {"lookahead": 3, "max_experts": 1} | config.get("prefetch", {})
    best = "next_token" if "profile" in config else "next_use"
    setup = CacheSetup([slots], config.get("eviction", best), config.get("allocation", "pool"), **prefetch)
    if "profile" in config:
        assert {len(step.expected) for step in steps} == {12}
        assert sum((-1, 1) in step.predicted for step in steps) >= 0.9 * len(steps)
    if prefetch["lookahead"] > 4:  # further than a trace looks by itself
        assert info.lookahead == prefetch["lookahead"] and {key[1] for key in next(iter(steps)).predicted} >= set(
            range(1, 9)
        )
    replayed = replay(info, steps, setup).stats
    assert counted["prefetches"] > 0 and counted["prefetch_hits"] > 0
    for name, value in replayed.items():
        if name not in ("stall_seconds", "fetch_seconds"):  # of the clock, which a replay without times does not have
            assert counted[name] == value, name
    # Rows are every token that was computed: prompts, less what the prefix cache had, and what was generated.
    assert info.num_experts == [8] * 12
    assert {len(step.requests) for step in steps} >= {1, 8}
    assert all(list(step.positions) == sorted(step.positions) for step in steps if len(set(step.requests)) == 1)
