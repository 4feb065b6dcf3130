"""`adapmoe doctor` on this machine and this installation, whole and spoilt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_MIXTRAL
from transformers import LlamaConfig

pytestmark = pytest.mark.engine


def doctor(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "adapmoe", "doctor", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"} | env,
    )  # fmt: skip


def test_plain_words(tmp_path):
    (tmp_path / "experts-0-of-1.pack").write_bytes(b"no pack")
    run = doctor("--model", TINY_MIXTRAL, "--store-dir", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert max(map(len, run.stdout.splitlines())) <= 80
    words = " ".join(run.stdout.split())
    for text in (
        "are supported", "accepts --moe-method", "host memory available", "8 experts, 2 per token",
        "passes the checks of a start", "What will work here", "What will not", "enable_lora", "start packs again",
    ):  # fmt: skip
        assert text in words


def test_json_says_what_is_wrong(tmp_path):
    LlamaConfig(
        hidden_size=64, num_hidden_layers=1, intermediate_size=64, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path)
    run = doctor("--json", "--model", tmp_path)
    assert run.returncode == 1
    told = json.loads(run.stdout)
    assert told["serves"] is False
    (problem,) = [one for one in told["findings"] if one["level"] == "problem"]
    assert "has no routed experts" in problem["text"]


def test_a_plugin_that_vllm_is_told_to_leave_out():
    run = doctor("--model", "/no/such/model", VLLM_PLUGINS="another")
    assert run.returncode == 1
    words = " ".join(run.stdout.split())
    assert "VLLM_PLUGINS=another leaves the plugin out" in words
    assert "silently serves with every expert resident if only additional_config enables the cache" in words
    assert "cannot load it" not in words, "not the model's fault"
    assert "What will work here" not in words


def test_who_needs_a_plugin_that_is_left_out_says_so(tmp_path):
    """Nothing of ours runs in vLLM then: what it says of the other ways must not look like a start without them."""
    env = os.environ | {"VLLM_PLUGINS": "another"}
    pack = [Path(sys.executable).parent / "adapmoe", "pack", TINY_MIXTRAL, "--store-dir", tmp_path]
    run = subprocess.run(pack, capture_output=True, text=True, env=env)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1] == (
        "adapmoe: error: VLLM_PLUGINS=another leaves the plugin out; add adapmoe to it, or unset it"
    )
    code = f"""
import sys
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    LLM({str(TINY_MIXTRAL)!r}, moe_method="adapmoe")
except TypeError as error:
    print(error)
AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--moe-method", "adapmoe"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 2
    assert "unexpected keyword argument 'moe_method'" in run.stdout.splitlines()[-1]
    assert "unrecognized arguments: --moe-method adapmoe" in run.stderr.splitlines()[-1]
