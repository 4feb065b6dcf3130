"""The parts of `python -m benchmarks serve` that need no server."""

from statistics import median

import numpy as np
import pytest
from conftest import TINY_MIXTRAL

from benchmarks import serve_load
from benchmarks.serve import configurations, point
from benchmarks.serve_bound import least_bytes
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.results import rotated
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo
from vllm_adapmoe.top.sample import parse_sample

RESULT = {
    "date": "20261125-040641", "backend": "openai", "num_prompts": 4, "request_rate": 3.0, "max_concurrency": 2,
    "duration": 10.0, "completed": 4, "failed": 0, "total_input_tokens": 350, "total_output_tokens": 128,
    "request_throughput": 0.4, "request_goodput": None, "output_throughput": 12.8, "total_token_throughput": 47.8,
    "latencies": [4.0, 4.0, 5.0, 5.0], "queue_times": [0.0, 0.0, 0.5, 1.5], "max_concurrent_requests": 3,
    "p50_ttft_ms": 428.1, "p99_ttft_ms": 599.4, "p50_tpot_ms": 218.9, "p99_tpot_ms": 234.1, "p50_itl_ms": 210.0,
    "p99_itl_ms": 320.3,
}  # fmt: skip
"""Of vLLM 0.32, less what nobody reads."""


def test_the_result_of_vllm_bench_serve():
    figures = serve_load.parse_result(RESULT)
    assert figures["output_tokens_per_second"] == 12.8 and figures["tpot_p99_ms"] == 234.1
    assert figures["mean_concurrency"] == pytest.approx(1.8)
    assert figures["mean_client_queue_ms"] == pytest.approx(500)
    with pytest.raises(AdapMoEError, match="has no p99_itl_ms"):
        serve_load.parse_result({key: value for key, value in RESULT.items() if key != "p99_itl_ms"})


def test_prompts_are_of_every_domain_and_of_mixed_lengths():
    texts = serve_load.domains(TINY_MIXTRAL, None)
    assert len(texts) >= 3
    prompts = serve_load.mixed_prompts(texts, 400, 16, 256, 7)
    assert [name for name, _ in prompts[: len(texts)]] == list(texts)
    lengths = [len(ids) for _, ids in prompts]
    assert min(lengths) >= 16 and max(lengths) <= 256
    assert 50 < median(lengths) < 82  # 64 is halfway from 16 to 256 on a logarithmic scale
    assert prompts == serve_load.mixed_prompts(texts, 400, 16, 256, 7)
    assert prompts != serve_load.mixed_prompts(texts, 400, 16, 256, 8)
    assert {len(ids) for _, ids in serve_load.mixed_prompts(texts, 9, 32, 32, 0)} == {32}


def test_too_few_domains(tmp_path):
    (tmp_path / "only.txt").write_text("text")
    with pytest.raises(AdapMoEError, match=r"has 1 \*\.txt; put at least 3"):
        serve_load.domains(TINY_MIXTRAL, tmp_path)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(serve_load, "PACKAGES", ("json", "no_such_module"))
    with pytest.raises(AdapMoEError, match=r"no_such_module is not installed; pip install vllm-adapmoe\[serve\]"):
        serve_load.check_packages()


def test_contenders():
    cache = {"cache_fraction": 0.5, "profile": "p.json"}
    gating = {"mode": "batch", "max_loss_increase": 0.005}
    configs = configurations(cache, gating, None)
    assert list(configs) == ["ours", "vllm_order", "ungated", "on_demand_lru"]
    assert configs["ours"] == cache | {"gating": gating}
    assert configs["vllm_order"] == configs["ours"] | {"scheduler": {"enabled": False}}
    lru = AdapMoEConfig.parse(configs["on_demand_lru"])
    assert lru.eviction == "lru" and lru.prefetch.lookahead == 0 and lru.gating.mode == "off"
    assert not lru.scheduler.enabled
    assert configurations({"cache_fraction": 1.0}, None, None) == {"ours": {"cache_fraction": 1.0}, "stock": None}
    with pytest.raises(AdapMoEError, match="'best' is not known; use ours"):
        configurations(cache, None, ["ours", "best"])
    with pytest.raises(AdapMoEError, match="set --gating"):
        configurations(cache, None, ["ungated"])
    with pytest.raises(AdapMoEError, match=r"gating\.mode=batch needs a profile"):
        configurations({"cache_fraction": 0.5}, gating, None)


def page(hits, misses, stall, steps):
    return f"""# HELP vllm:adapmoe_expert_hits_total Experts.
# TYPE vllm:adapmoe_expert_hits_total counter
vllm:adapmoe_expert_hits_total{{engine="0"}} {hits}
vllm:adapmoe_expert_hits_total{{engine="1"}} 1.0
# TYPE vllm:adapmoe_expert_misses_total counter
vllm:adapmoe_expert_misses_total{{engine="0"}} {misses}
# TYPE vllm:adapmoe_fetch_stall_seconds histogram
vllm:adapmoe_fetch_stall_seconds_sum{{engine="0"}} {stall}
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{engine="0",le="+Inf"}} {steps}
vllm:iteration_tokens_total_sum{{engine="0"}} 99.0
vllm:iteration_tokens_total_count{{engine="0"}} {steps}
"""


def test_counters_of_one_load():
    before, after = (parse_sample(page(*values), 0.0).values for values in ((10, 5, 1.5, 20), (40, 15, 3.5, 70)))
    assert before["vllm:adapmoe_expert_hits_total"] == 11
    figures = serve_load.counted(before, after, {"output_tokens": 100.0, "seconds": 8.0})
    assert figures["hit_rate"] == 0.75
    assert figures["stall_share"] == 0.25
    assert figures["steps_per_output_token"] == 0.5
    stock = serve_load.counted({}, {"vllm:iteration_tokens_total_count": 5.0}, {"output_tokens": 10.0, "seconds": 1.0})
    assert stock == {"steps_per_output_token": 0.5, "preemptions": 0.0}


def test_each_contender_comes_first_in_turn():
    assert [rotated(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert rotated(["a", "b", "c"], 2) == ["c", "a", "b"]


def test_ratios_are_of_the_same_round():
    figures = serve_load.parse_result(RESULT)
    slow = [figures, figures | {"output_tokens_per_second": 6.4}]
    fast = [figures | {"output_tokens_per_second": speed} for speed in (25.6, 16.0)]
    result = point({"ours": fast, "vllm_order": slow}, "ours")
    assert result["ratios"]["vllm_order"]["output_tokens_per_second"] == {
        "median": 2.25,
        "min": 2,
        "max": 2.5,
        "runs": 2,
    }
    assert "on_demand_lru" not in result["ratios"]
    assert point({"ours": fast, "vllm_order": slow}, "vllm_order")["ratios"] == {}


def test_no_policy_moves_less_than_the_bound():
    generator = np.random.default_rng(0)
    info = TraceInfo("m", [8, 8, 8], 2, 0, [100] * 3, [0] * 3)
    steps = [
        Step(float(number), ["a"] * rows, np.full(rows, number, dtype=np.int32),
             np.stack([generator.permuted(np.tile(np.arange(8), (rows, 1)), axis=1)[:, :2] for _ in range(3)]),
             np.ones((3, rows, 2)), {})
        for number, rows in enumerate(generator.integers(1, 4, 200).tolist())
    ]  # fmt: skip
    for slots in (8, 12, 20):
        least = least_bytes(info, steps, slots)
        assert least > 0
        for eviction in ("lru", "next_use"):
            config = {"eviction": eviction, "prefetch": {"lookahead": 0}}
            moved = replay(info, steps, CacheSetup.from_config(AdapMoEConfig.parse(config), [slots], None)).stats[
                "fetched_bytes"
            ]
            assert least <= moved
