"""The real server and the official client: streamed tokens, metrics, aborted requests."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MIXTRAL
from demo import DemoServer

pytestmark = pytest.mark.engine


def check_top(server: DemoServer) -> None:
    """`adapmoe top` of the server that has just answered, beside its own counters."""
    once = subprocess.run(
        [Path(sys.executable).parent / "adapmoe", "top", server.url, "--once", "--interval", "0.2"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert once.returncode == 0, once.stderr
    lines = once.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("of 24 slots hold an expert" in line for line in lines)
    assert sum(line.count("/8") for line in lines) == 12, "layers"
    told = json.loads(
        subprocess.run(
            [Path(sys.executable).parent / "adapmoe", "top", server.url, "--once", "--json"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    counted = server.metrics()
    hits, misses = (counted[f"vllm:adapmoe_expert_{name}_total"] for name in ("hits", "misses"))
    assert told["start"]["hit_rate"] == pytest.approx(hits / (hits + misses))
    assert told["start"]["output_tokens"] == 96 and told["start"]["token_seconds"] > 0
    assert told["start"]["experts_per_token"] == pytest.approx(1.6, abs=0.15)
    assert told["interval"]["hit_rate"] is None, "nothing was asked"
    assert sum(layer["resident"] for layer in told["layers"]) <= 24


@pytest.mark.versions
def test_serve_stream_abort_and_metrics(tmp_path, monkeypatch):
    from tests.integration.test_dashboard import check_names

    config = {
        "cache_experts": 24,
        "store_dir": tmp_path / "store",
        "profile": ROOT / "configs" / "tiny_mixtral.json",
        "gating.mode": "token",
        "gating.target_experts": 1.6,
        "allocation": "profile",
    }
    flags = [part for key, value in config.items() for part in (f"--adapmoe-config.{key}", str(value))]
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1")
    with DemoServer("server", tmp_path, None, "--enforce-eager", "--moe-method", "adapmoe", *flags) as server:
        client = server.client()
        first, _ = server.stream(show=False)
        assert len(first) == 96
        counted = server.metrics()
        assert counted["vllm:adapmoe_slots"] == 24
        assert counted["vllm:adapmoe_resident_experts"] >= 23  # a slot for staging may be empty
        assert counted["vllm:adapmoe_expert_misses_total"] > 0
        record = 3 * 128 * 256 * 2
        assert counted["vllm:adapmoe_fetched_bytes_total"] >= counted["vllm:adapmoe_demand_loads_total"] * record
        assert counted["vllm:adapmoe_fetch_stall_seconds_sum"] > 0
        assert counted["vllm:adapmoe_fetch_seconds_total"] > 0
        kept = counted["vllm:adapmoe_kept_experts_total"] / counted["vllm:adapmoe_gated_tokens_total"]
        assert kept == pytest.approx(1.6, abs=0.15)
        assert counted["vllm:adapmoe_gating_loss_nats_total"] > 0
        check_top(server)
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            check_names(answer.read().decode())
        # A client that hangs up mid-stream takes nothing from the next one.
        stream = client.completions.create(model="tiny-mixtral", prompt="def ", max_tokens=900, stream=True)
        for number, _ in enumerate(stream):
            if number == 3:
                stream.close()
                break
        chat = client.chat.completions.create(
            model="tiny-mixtral", messages=[{"role": "user", "content": "import os"}], max_tokens=8
        )
        assert chat.usage.completion_tokens > 0
        again, _ = server.stream(show=False)
        assert again == first
        assert server.metrics()["vllm:adapmoe_expert_hits_total"] > counted["vllm:adapmoe_expert_hits_total"]
    log = (tmp_path / "server.log").read_text()
    assert "Expert cache: 24 slots" in log
    assert "Packing experts" in log
    assert "Adaptive gating (token): threshold " in log
    interval = next(line for line in log.splitlines() if "Expert cache: hit rate: " in line)
    for part in ("while fetching", "of 24 slots", "prefetches used: ", "experts per token: 1.", "gating loss: 0.0"):
        assert part in interval


def test_the_demo_cleans_up_when_interrupted(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.demo"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("*/stock-vllm.log")):
        assert demo.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(5)
    os.kill(demo.pid, signal.SIGINT)
    assert demo.wait(timeout=300) == 130
    assert list(tmp_path.glob("adapmoe-demo-*")) == []
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _read(path)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_model_is_bundled():
    assert (TINY_MIXTRAL / "model.safetensors").is_file()
