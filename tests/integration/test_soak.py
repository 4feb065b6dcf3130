"""A short soak of a real server, and one load of `python -m benchmarks serve`."""

import urllib.request

import psutil
import pytest
from conftest import ROOT, TINY_MIXTRAL

from benchmarks.serve import ServeSpec, run_serve
from benchmarks.server import KV_CACHE_BYTES, Server
from benchmarks.soak import SoakSpec, run_soak
from benchmarks.soak_traffic import GREEDY

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("every_core")]

PROFILE = str(ROOT / "configs" / "tiny_mixtral.json")
SECONDS = 24
POOLS = 32
"""Threads that the pools of a server's processes may start late; a leak would be one for each request."""


def test_a_short_soak(tmp_path):
    config = {
        "cache_fraction": 0.5,
        "store_dir": str(tmp_path),
        "profile": PROFILE,
        "gating": {"mode": "token", "max_loss_increase": 0.005},
    }
    spec = SoakSpec(
        model=TINY_MIXTRAL, config=config, seconds=SECONDS, stock_seconds=0, clients=8, replayed=20, timeout=300,
        seed=0, serve_args=["--enforce-eager"],
    )  # fmt: skip
    result = run_soak(spec)
    ours = result["servers"]["ours"]
    assert [requirement for requirement, met in result["verdict"].items() if met is False] == [], ours["bad"]
    ended = {end for ends in ours["outcomes"].values() for end in ends}
    assert ended == {"answered", "refused", "hung up"}
    assert ours["outcomes"]["oversized"].keys() == {"refused"}
    answered = sum(ours["outcomes"][kind].get("answered", 0) for kind in GREEDY)
    threads = ours["growth"]["threads"]
    assert threads["after"] - threads["before"] < POOLS
    assert ours["replay"]["replayed"] == min(answered, 20) > 0
    assert ours["counters"]["vllm:adapmoe_fetched_bytes_total"] > 0


def test_one_load_of_vllm_bench_serve(tmp_path):
    cache = {"cache_fraction": 0.5, "store_dir": str(tmp_path)}
    spec = ServeSpec(
        model=TINY_MIXTRAL, cache=cache, contenders=["ours"], serve_args=["--enforce-eager"], concurrency=[2],
        requests=2, rounds=1, output_tokens=8, prompt_tokens=(16, 64),
    )  # fmt: skip
    result = run_serve(spec)
    point = result["loads"][0]["contenders"]["ours"]
    assert point["completed"]["median"] == 8 and point["failed"]["median"] == 0
    assert point["output_tokens"]["median"] == 64
    assert 0 < point["hit_rate"]["median"] < 1
    assert 0 < point["mean_concurrency"]["median"] <= 2
    bound = result["bounds"]["ours"]
    assert bound["slots"] == 48
    assert 0 < bound["least_bytes_per_output_token"] <= bound["moved_bytes_per_output_token"]


def test_a_paused_server_goes_on(tmp_path):
    # The plugin's: a stock eager server dies of SIGILL on CPUs with AMX, which nothing asks the kernel for.
    flags = ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    config = {"cache_fraction": 0.5, "store_dir": str(tmp_path)}
    with Server("paused", TINY_MIXTRAL, tmp_path, config, flags) as server:
        asked = {"prompt": "#include <", "max_tokens": 16, "ignore_eos": True}
        before = server.complete(**asked)["choices"]
        server.pause()
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=2)
        server.resume()
        assert server.complete(**asked)["choices"] == before
        assert server.metrics()["vllm:generation_tokens_total"] == 32
        processes = server.processes()
    assert [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
