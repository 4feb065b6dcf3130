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


def test_contenders_answer_the_same_tokens(tmp_path):
    result = tmp_path / "peers.json"
    arguments = ["peers", TINY_MIXTRAL, "--rounds", 1, "--prompt-tokens", 16, "--output-tokens", TOKENS]
    arguments += [
        "--slots",
        48,
        "--enforce-eager",
        "--contenders",
        "llama.cpp,transformers",
        "--files",
        tmp_path / "files",
        "-o",
        result,
    ]
    if memory_cgroup.why_not() is None:
        arguments += ["--memory", "3GiB"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(result.read_text())
    points = content["contenders"]
    assert list(points) == ["llama.cpp", "transformers", "adapmoe"]
    for name in ("transformers", "adapmoe"):
        assert points[name]["decode_tokens_per_second"]["median"] > 0
        assert points[name]["agreement"] >= 0.75, name
        assert points[name]["held_bytes"] > 100 << 20
    assert points["adapmoe"]["settings"] == {"slots": 48}
    assert points["adapmoe"]["read_bytes_per_token"]["median"] > 0
    assert points["adapmoe"]["ratio_to_best_peer"]["median"] > 0
    assert content["floor"]["sequential_bytes_per_second"]["median"] > 0
    if find_spec("llama_cpp") and find_spec("gguf"):
        assert points["llama.cpp"]["agreement"] >= 0.75
    else:
        assert "is not installed; pip install vllm-adapmoe[peers]" in run.stdout
    assert (tmp_path / "files" / "pack" / "experts-0-of-1.pack").exists()
    assert not (tmp_path / "files" / "offloaded").exists()
