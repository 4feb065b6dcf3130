"""The `adapmoe` command, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MIXTRAL

pytestmark = pytest.mark.engine

ADAPMOE = Path(sys.executable).parent / "adapmoe"


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "COLUMNS": "100"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=ROOT)


def adapmoe(*arguments: object) -> subprocess.CompletedProcess[str]:
    return ran(ADAPMOE, *arguments)


def test_pack_makes_one_file_once(tmp_path):
    for _ in range(2):
        run = adapmoe("pack", TINY_MIXTRAL, "--store-dir", tmp_path)
        assert run.returncode == 0, run.stderr[-2000:]
        (pack,) = tmp_path.iterdir()
        made = pack.stat().st_mtime_ns
    assert pack.name == "experts-0-of-1.pack"
    assert pack.stat().st_mtime_ns == made
    assert "using the packed experts" in run.stdout + run.stderr
    pack.write_bytes(pack.read_bytes()[:-4096])
    again = adapmoe("pack", TINY_MIXTRAL, "--store-dir", tmp_path)
    assert "packing 96 experts again" in again.stdout + again.stderr
    refused = adapmoe("pack", "/no/such/model")
    assert refused.returncode != 0


def test_bench_overhead_writes_what_made_it(tmp_path):
    result = tmp_path / "overhead.json"
    run = ran(
        sys.executable, "-m", "benchmarks", "overhead", TINY_MIXTRAL, "--rounds", 1, "--prompt-tokens", 16,
        "--output-tokens", 8, "--enforce-eager", "-o", result,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "all resident" in run.stdout and "one short" in run.stdout
    content = json.loads(result.read_text())
    assert content["same_tokens"] is True
    assert content["environment"]["command"].startswith("python -m benchmarks overhead")
    assert content["environment"]["versions"]["vllm"].startswith("0.32")
    assert content["ratio_to_stock"]["all_resident"]["decode_tokens_per_second"]["median"] > 0
