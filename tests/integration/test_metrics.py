"""Counters on `/metrics` are the worker's own, whatever stands between: several API servers, several ranks."""

import json
import pickle
import time
import urllib.request

import pytest
from demo import DemoServer

from tests.integration.scenarios import ENGINE_ARGS, greedy, prompts
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.reported_output import ends_step, report_of, with_report
from vllm_adapmoe.integration.scheduler.metrics import ExpertCacheStatLogger
from vllm_adapmoe.scheduling.report import WorkerReport

pytestmark = pytest.mark.engine

EVENTS = {"expert_hits": "hits", "expert_misses": "misses", "prefetch_hits": "prefetch_hits", "prefetches_late": "late"}
"""Counted within steps. A prefetch may go on after the last one, and its bytes are told with the next."""


def of_worker(port: int) -> dict[str, float]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc", json.dumps({"method": "expert_cache_stats"}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["results"][0]


def test_two_api_servers(tmp_path, monkeypatch):
    """The engine tells one of them of a step. What they were told adds up."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /collective_rpc
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    config = {"cache_experts": 24, "store_dir": str(tmp_path / "store"), "allocation": "trace"}
    with DemoServer("server", tmp_path, config, "--enforce-eager", "--api-server-count", "2") as server:
        for number in range(12):  # each in a connection of its own, which either of the two may take
            with server.client() as client:
                client.completions.create(model="tiny-mixtral", prompt=f"def f{number}(", max_tokens=6, temperature=0)
        expected = of_worker(server.port)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            counted = server.metrics()
            told = {key: counted[f"vllm:adapmoe_{name}_total"] for name, key in EVENTS.items()}
            if told == {key: expected[key] for key in told}:
                break
            time.sleep(0.1)
        assert told == {key: expected[key] for key in told}
        assert told["hits"] > 0 and told["misses"] > 0
        assert counted["vllm:adapmoe_layer_hits_total"] == told["hits"], "all layers together"
        assert counted["vllm:adapmoe_layer_misses_total"] == told["misses"]
        assert 0 < counted["vllm:adapmoe_fetched_bytes_total"] <= expected["fetched_bytes"]
        assert counted["vllm:adapmoe_fetch_stall_seconds_sum"] == pytest.approx(expected["stall_seconds"])
        assert counted["vllm:adapmoe_fetch_stall_seconds_count"] == 12 * 6, "steps"
        assert counted["vllm:adapmoe_slots"] == 24
        assert counted["vllm:adapmoe_layer_slot_floor"] > 0
        assert 20 <= counted["vllm:adapmoe_layer_resident_experts"] <= counted["vllm:adapmoe_resident_experts"] <= 24
        assert 1e6 < counted["vllm:adapmoe_link_bandwidth_bytes_per_second"] < 1e12
    log = (tmp_path / "server.log").read_text()
    assert "Started server process" in log
    assert "hit rate" not in log, "each of two servers would log a part as if it were all"


def test_two_ranks(tiny_model, monkeypatch, every_core):
    """Every rank's shards count; a step waits for the slowest rank; starting over loses and repeats nothing."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{every_core[0]}|{every_core[-1]}")
    config = {"cache_fraction": 0.5}
    args = ENGINE_ARGS | {"enforce_eager": True, "tensor_parallel_size": 2}
    with Engine(tiny_model("mixtral"), config, **args) as engine:
        core = engine.llm.llm_engine
        counter = ExpertCacheStatLogger(core.vllm_config)
        counter.log_engine_initialized()
        core.logger_manager.stat_loggers.append(counter)

        def run(output_tokens: int) -> list[dict[str, float]]:
            params = greedy()
            params.max_tokens = output_tokens
            engine.llm.generate([{"prompt_token_ids": prompts(1, 128, seed=4)[0]}], params, use_tqdm=False)
            return engine.llm.collective_rpc("expert_cache_stats")

        def told() -> dict[str, float]:
            return {key: counter.counted[key] for key in ("hits", "misses", "late", "prefetch_hits", "stall_seconds")}

        def expected(ranks: list[dict[str, float]], before: dict[str, float]) -> dict[str, float]:
            return {key: before[key] + sum(one[key] for one in ranks) for key in before if key != "stall_seconds"}

        first = run(8)
        assert all(one["hits"] > 0 and one["misses"] > 0 for one in first)
        run(1)  # a step: the ranks tell each other of the one before while it runs
        none = dict.fromkeys(told(), 0.0)
        assert told() | {"stall_seconds": 0} == expected(first, none) | {"stall_seconds": 0}
        longest, all_together = (function(one["stall_seconds"] for one in first) for function in (max, sum))
        assert longest <= told()["stall_seconds"] <= all_together
        assert counter.gauges["slots"] == sum(one["slots"] for one in first)
        before_restart = engine.llm.collective_rpc("expert_cache_stats")
        engine.call("set_cache", config)
        again = run(8)
        run(1)
        both = expected(again, expected(before_restart, none))
        assert told() | {"stall_seconds": 0} == both | {"stall_seconds": 0}


@pytest.mark.versions
def test_an_output_that_is_still_on_its_way():
    """As a CUDA device gives it, with asynchronous scheduling: the report is of its step, and nothing is waited for."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

    class OnItsWay(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            waited.append(self)
            return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})

        def get_kv_connector_output(self) -> str:  # abstract from 0.33 on
            return "what is left of a step that failed"

    waited: list[object] = []
    reports = [WorkerReport(failed_requests=(name,)) for name in "abc"]
    first = with_report(OnItsWay(), reports[0])
    second = with_report(ModelRunnerOutput(req_ids=["b"], req_id_to_index={"b": 0}), reports[1])
    third = with_report(EMPTY_MODEL_RUNNER_OUTPUT, reports[2])
    assert all(map(ends_step, (first, second, third))) and not ends_step(None)
    assert first.get_kv_connector_output() == "what is left of a step that failed"
    assert not waited
    first = first.get_output()
    assert (first.req_ids, second.req_ids, third.req_ids) == (["a"], ["b"], [])
    assert [report_of(output) for output in pickle.loads(pickle.dumps([first, second, third]))] == reports
    assert report_of(EMPTY_MODEL_RUNNER_OUTPUT) == WorkerReport(), "vLLM's shared object stays as it is"
