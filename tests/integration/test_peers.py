"""`python -m benchmarks peers` on the bundled model, as a user runs it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, TINY_MIXTRAL

from benchmarks import memory_cgroup

pytestmark = pytest.mark.engine

TOKENS = 8
HELDOUT = ROOT / "examples" / "tiny_mixtral" / "heldout"


def test_contenders_answer_the_same_tokens(tmp_path):
    result = tmp_path / "peers.json"
    arguments = ["peers", TINY_MIXTRAL, "--rounds", 1, "--prompt-tokens", 16, "--output-tokens", TOKENS]
    arguments += ["--enforce-eager", "--contenders", "llama.cpp,llama.cpp-q8_0,transformers,adapmoe-8"]
    arguments += ["--loss-tokens", 256, "--text", HELDOUT, "--files", tmp_path / "files", "-o", result]
    limited = memory_cgroup.why_not() is None
    if limited:
        arguments += ["--memory", "1GiB,3GiB"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(result.read_text())
    limits = content["limits"]
    assert [limit["memory_bytes"] for limit in limits] == ([1 << 30, 3 << 30] if limited else [None])
    points = limits[-1]["contenders"]
    assert list(points) == ["llama.cpp", "llama.cpp-q8_0", "transformers", "adapmoe-8"]
    for name in ("transformers", "adapmoe-8"):
        assert points[name]["decode_tokens_per_second"]["median"] > 0
        assert points[name]["agreement"] >= 0.75, name
        assert points[name]["held_bytes"] > 100 << 20
    assert points["adapmoe-8"]["settings"] == {"slots": 95 if limited else 48}
    assert points["adapmoe-8"]["ratio_to_best_peer"]["median"] > 0
    assert 1.5 < content["losses"]["adapmoe-8"]["nats"] < 4
    if find_spec("llama_cpp") and find_spec("gguf"):
        assert points["llama.cpp"]["agreement"] >= 0.75
        nats = [content["losses"][name]["nats"] for name in ("llama.cpp", "llama.cpp-q8_0", "adapmoe-8")]
        assert max(nats) - min(nats) < 0.01 * min(nats)
        assert set(limits[-1]["rivals"]) == {"llama.cpp", "llama.cpp-q8_0"}
    else:
        assert "is not installed; pip install vllm-adapmoe[peers]" in run.stdout
    assert (tmp_path / "files" / "pack" / "experts-0-of-1-int8.pack").exists()
    assert not (tmp_path / "files" / "offloaded").exists()
