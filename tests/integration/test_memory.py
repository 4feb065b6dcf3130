"""A model larger than memory runs, and packing streams: real files, a real memory limit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from vllm.platforms import current_platform

from benchmarks import memory_cgroup

pytestmark = pytest.mark.engine

FACTOR = 128
EXPERT_BYTES = 3 * 128 * 256 * FACTOR * 2
LAYERS, EXPERTS, TOP_K = 12, 8, 2
ALL_EXPERTS = LAYERS * EXPERTS * EXPERT_BYTES
LIMIT = 3 << 29
SLOTS = 16


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """The bundled model with experts 128 times as big, 2.25 GiB of them; computes the same."""
    folder = tmp_path_factory.mktemp("wide")
    script = ROOT / "examples" / "widen_experts.py"
    subprocess.run([sys.executable, script, TINY_MIXTRAL, folder, "--factor", str(FACTOR)], check=True)
    return folder


def offline(
    model: Path, config: dict[str, Any] | None, procs: Path | None = None, **args: Any
) -> subprocess.CompletedProcess[str]:
    def enter() -> None:
        if procs is not None:
            procs.write_text(str(os.getpid()))

    script = Path(__file__).parent / "run_offline.py"
    command = [sys.executable, script, model, json.dumps(config), *([json.dumps(args)] if args else [])]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)


def answer(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small():
    """What stock vLLM answers and takes with the bundled model."""
    return answer(offline(TINY_MIXTRAL, None))


@pytest.mark.skipif(memory_cgroup.why_not() is not None, reason=str(memory_cgroup.why_not()))
def test_a_model_larger_than_memory_serves_the_right_tokens(wide_model, small, tmp_path):
    assert ALL_EXPERTS >= 1.5 * LIMIT
    config = {"cache_experts": SLOTS, "store": "file", "store_dir": str(tmp_path)}
    with memory_cgroup.limited_memory(LIMIT) as group:
        packed = offline(wide_model, config, group.procs)  # packs under the limit, too
        inode = (tmp_path / "experts-0-of-1.pack").stat().st_ino
        again = offline(wide_model, config, group.procs)
        stock = offline(wide_model, None, group.procs)
    wide = answer(packed)
    assert wide["tokens"] == small["tokens"]
    assert wide["stats"]["misses"] > 0
    assert answer(again)["tokens"] == small["tokens"]
    assert (tmp_path / "experts-0-of-1.pack").stat().st_ino == inode, "a valid pack was packed again"
    assert stock.returncode == -9, f"stock vLLM was not killed: {stock.stderr[-2000:]}"


def test_packing_and_serving_need_two_layers_beside_the_slots(wide_model, small, tmp_path):
    """Peak anonymous memory, against that of stock vLLM with the small model."""
    config = {"cache_experts": SLOTS, "store": "file", "store_dir": str(tmp_path)}
    packed = answer(offline(wide_model, config))
    restored = answer(offline(wide_model, config))
    layer = EXPERTS * EXPERT_BYTES
    other_weights = TINY_MIXTRAL.joinpath("model.safetensors").stat().st_size
    assert packed["peak"] < small["peak"] + other_weights + SLOTS * EXPERT_BYTES + 2 * layer
    assert restored["peak"] < small["peak"] + other_weights + SLOTS * EXPERT_BYTES + 2 * layer
    assert packed["tokens"] == restored["tokens"] == small["tokens"]


def test_an_automatic_budget_stays_within_what_vllm_may_use(wide_model, small, tmp_path):
    """Slots are there before vLLM profiles memory, so they and a KV cache of all the rest fit into it together."""
    usable = 5 << 29
    share = {
        "gpu_memory_utilization": usable / current_platform.get_device_total_memory(),
        "kv_cache_memory_bytes": None,
    }
    config = {"store": "file", "store_dir": str(tmp_path)}
    run = offline(wide_model, config | {"cache_gb": "auto"}, **share)
    result = answer(run)
    assert result["tokens"] == small["tokens"]
    assert TOP_K <= result["stats"]["slots"] < LAYERS * EXPERTS
    assert result["stats"]["resident"] > 0.9 * result["stats"]["slots"], "what is not filled takes no memory"
    slot_bytes = result["stats"]["slots"] * EXPERT_BYTES
    assert usable - slot_bytes < result["peak"] <= usable
    (line,) = [line for line in run.stdout.splitlines() + run.stderr.splitlines() if "for slots of" in line]
    assert "KV cache (one request of 128 tokens)" in line

    refused = offline(wide_model, config | {"cache_gb": 2.2}, **share)
    assert refused.returncode != 0
    assert re.search(r"cache_gb=2.2 takes 2.180 GiB for 93 expert slots, \d+ bytes \(", refused.stderr)


OSS = {"num_hidden_layers": 32, "num_local_experts": 16, "hidden_size": 512, "intermediate_size": 1024}
OSS_EXPERTS = 32 * 16 * (3 * 512 * 1024 + 2 * 1024 + 512) * 2


@pytest.fixture(scope="module")
def copying_model(tmp_path_factory):
    """A gpt-oss in bf16, which vLLM's loader copies into parameters past their weight loader: 1.5 GiB of experts."""
    config = GptOssConfig(
        **OSS, vocab_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts_per_tok=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        layer = re.sub(r"layers\.\d+", "layers", name)  # made once: layers differ by a factor
        if layer not in tensors:
            scale = 1.0 if "embed" in name else 0.05
            tensors[layer] = (torch.randn(parameter.shape, generator=generator) * scale).bfloat16()
            if parameter.dim() == 1 and "norm" in name:
                tensors[layer] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    state = {}
    for name, _ in model.named_parameters():
        number = re.search(r"layers\.(\d+)", name)
        factor = 1 if number is None or "experts" not in name else 0.75 + int(number[1]) / 64
        state[name] = tensors[re.sub(r"layers\.\d+", "layers", name)] * factor
    folder = tmp_path_factory.mktemp("gpt-oss")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.skipif(memory_cgroup.why_not() is not None, reason=str(memory_cgroup.why_not()))
def test_experts_that_a_loader_copies_by_itself_stream_too(copying_model, tmp_path):
    limit = 9 << 27
    assert 1.3 * limit < OSS_EXPERTS
    stock = answer(offline(copying_model, None))
    config = {"cache_experts": 32, "store": "file", "store_dir": str(tmp_path), "scheduler": {"enabled": False}}
    with memory_cgroup.limited_memory(limit) as group:
        packed = answer(offline(copying_model, config, group.procs))
        restored = answer(offline(copying_model, config, group.procs))
        refused = offline(copying_model, {"cache_experts": 32, "store": "host"}, group.procs)
    assert packed["tokens"] == restored["tokens"] == stock["tokens"]
    assert packed["stats"]["misses"] > 0
    assert refused.returncode == 1, "killed"
    line = next((line for line in refused.stderr.splitlines() if "store=host needs" in line), "")
    assert re.search(rf"GiB\) are available, limited by {group.folder}/\S+ = 1.12 GiB; use store=file$", line), line
    layer = OSS_EXPERTS // 32
    assert packed["peak"] < restored["peak"] + 2 * layer
