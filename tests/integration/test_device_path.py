"""What only a GPU runs, on the CPU: maps instead of pairs, steps that do not wait for the host, model runner V2.

Two things stand in for a GPU's. Experts keep the layout of the checkpoint, as for vLLM's Triton kernel, and that kernel
is a few lines of PyTorch that know its map; Triton's interpreter runs the kernels that decide and fetch on the GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL
from vllm import SamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.model_executor.layers.fused_moe import MoERunner

from tests.integration.played_gpu import interpret_kernels, play_gpu, stand_in
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.device import decode
from vllm_adapmoe.integration.layers.cached_experts import padding_rows
from vllm_adapmoe.integration.layers.graph_break import break_graph_at, graphs_in_pieces, graphs_without_host
from vllm_adapmoe.integration.loading import host_room
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.worker import gpu_steps
from vllm_adapmoe.store.host_memory import HostMemory

pytestmark = pytest.mark.engine

VOCABULARY = 2048
CONFIGS = ROOT / "configs"
ARGS = ENGINE_ARGS | {"enforce_eager": True, "dtype": "float16"}


@pytest.fixture
def as_on_gpu(monkeypatch):
    play_gpu(monkeypatch)


HALF = VLLM_STEPS | {"cache_fraction": 0.5, "store": "host"}
GATED = {"profile": str(CONFIGS / "tiny_mixtral.json"), "gating": {"mode": "token", "target_experts": 1.5}}


def ask(engine: Engine) -> list[Any]:
    return answers(engine, prompts(4, VOCABULARY, seed=4), greedy(logprobs=2))


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param(48, id="half"),
        pytest.param(92, id="most-layers-as-a-whole"),
    ],
)
def test_maps_to_the_last_bit(as_on_gpu, stock, slots):
    """One wave: what the same kernel gives without the plugin. Layers that are resident as a whole do not wait."""
    config = VLLM_STEPS | {"cache_experts": slots, "store": "host", "decode": "host"}
    with Engine(TINY_MIXTRAL, config, **ARGS) as engine:
        assert [ask(engine), ask(engine)] == stock
        stats = engine.cache_stats()
        deferred = engine.llm.collective_rpc(
            lambda worker: int((worker.gpu_steps.routing.ids[:, 0] >= 0).any(-1).sum())
        )[0]
    assert stats["demand_loads"] > 0
    assert slots == 48 or deferred >= 8, "layers that have left their routing on the device"


@pytest.fixture(scope="module")
def stock():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        with Engine(TINY_MIXTRAL, None, **ARGS) as engine:
            return [ask(engine), ask(engine)]


def test_maps_in_waves(as_on_gpu, stock):
    """With fewer slots than a layer has experts: equal within the rounding of several sums to float16."""
    config = VLLM_STEPS | {"cache_experts": 5, "store": "host", "decode": "host"}
    with Engine(TINY_MIXTRAL, config, **ARGS) as engine:
        ours = ask(engine)
    for (tokens, logprobs), (expected, theirs) in zip(ours, stock[0], strict=True):
        assert tokens[0] == expected[0]
        assert logprobs[0][tokens[0]] == pytest.approx(theirs[0][tokens[0]], abs=0.01)


def short(engine: Engine) -> list[Any]:
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
    return answers(engine, [[11, 12, 13], [700, 701, 702, 703]], params)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [tokens for tokens, _ in outputs]


@pytest.fixture
def interpreted(monkeypatch):
    interpret_kernels(monkeypatch)


@pytest.mark.parametrize("gating", [{}, GATED], ids=["all-kept", "gated"])
def test_decided_on_the_gpu(as_on_gpu, interpreted, monkeypatch, gating):
    """Prompts by the host, decode steps by the GPU: every bit as with the host alone."""
    monkeypatch.setattr(decode, "MAX_TOKENS", 3)
    with Engine(TINY_MIXTRAL, HALF | gating | {"decode": "host"}, **ARGS) as engine:
        expected, by_host = short(engine), engine.cache_stats()
    with Engine(TINY_MIXTRAL, HALF | gating | {"decode": "device"}, **ARGS) as engine:
        assert short(engine) == expected
        stats = engine.cache_stats()
        assert short(engine) == expected, "the second time others are resident"
        assert short(engine) == expected, "and prompts come after steps of the GPU"
    assert stats["hits"] + stats["misses"] == by_host["hits"] + by_host["misses"]
    assert stats["prefetches"] > 0 and 0 < stats["resident"] <= 48 and stats["stall_seconds"] > 0
    for name in ("gated_tokens", "kept_experts"):
        assert stats[name] == by_host[name], "counted when the step has run"
    assert stats["loss_spent"] == pytest.approx(by_host["loss_spent"], rel=1e-2)
    assert (stats["gated_tokens"] > 0) == bool(gating)


def test_gated_by_batch_on_the_gpu(as_on_gpu, interpreted, monkeypatch):
    """Without prefetch, whose timing has a part in what is resident, the host drops the same, and spends the same."""
    monkeypatch.setattr(decode, "MAX_TOKENS", 3)
    gating = {"mode": "batch", "max_loss_increase": 0.05}
    config = HALF | GATED | {"gating": gating, "prefetch": {"lookahead": 0}}
    both = []
    for decides in ("host", "device"):
        with Engine(TINY_MIXTRAL, config | {"decode": decides}, **ARGS) as engine:
            outputs = [short(engine), short(engine)]
            thresholds = engine.llm.collective_rpc(threshold_of)
            both.append((outputs, engine.cache_stats(), thresholds))
    (by_host, host, spent), (by_gpu, gpu, as_much) = both
    assert by_gpu == by_host
    for name in ("hits", "misses", "gated_tokens", "kept_experts"):
        assert gpu[name] == host[name] > 0
    assert gpu["kept_experts"] < 2 * gpu["gated_tokens"] and gpu["loss_spent"] == pytest.approx(host["loss_spent"])
    assert as_much == pytest.approx(spent), "the threshold that the GPU has adapted"


def threshold_of(worker: Any) -> float:
    worker._give_back()
    assert worker.gating.threshold != worker.gating.plan.threshold
    return float(worker.gating.threshold)


def test_gating_waits_for_nothing_where_every_expert_is_resident(as_on_gpu):
    """The same bits, and the same counts, as with half of them, where the host sees every choice."""
    with Engine(TINY_MIXTRAL, HALF | GATED | {"decode": "host"}, **ARGS) as engine:
        expected, by_fetch = short(engine), engine.cache_stats()
    with Engine(TINY_MIXTRAL, VLLM_STEPS | GATED | {"cache_experts": 96}, **ARGS) as engine:
        assert short(engine) == expected
        stats = engine.cache_stats()
        steps = engine.llm.collective_rpc(lambda worker: worker.gpu_steps.routing.ids[:, 0].max(-1).values.tolist())[0]
    assert min(steps) >= 0, "every layer has left its routing on the device"
    for name in ("gated_tokens", "kept_experts"):
        assert stats[name] == by_fetch[name] > 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"decode": "device", "store": "host"}, "decode=device needs a GPU"),
        ({"host_gb": 4.0}, r"host_gb=4.0 does not work on the CPU, .* raise cache_gb"),
    ],
)
def test_what_needs_a_gpu(config, reason):
    with pytest.raises(AdapMoEError, match=reason):
        Engine(TINY_MIXTRAL, {"cache_fraction": 0.5} | config, **ENGINE_ARGS)


def test_host_tier(as_on_gpu, stock, tmp_path):
    """A third of the experts in slots, a third in host memory, all in a file: every bit as without the plugin."""
    config = VLLM_STEPS | {"cache_experts": 32, "host_gb": 0.006, "store_dir": str(tmp_path), "decode": "host"}
    with Engine(TINY_MIXTRAL, config, **ARGS) as engine:
        assert [ask(engine), ask(engine)] == stock
        stats = engine.cache_stats()
        cells = engine.llm.collective_rpc(lambda worker: worker.expert_cache.store.num_cells)[0]
    assert cells == 32, "of 192 KiB"
    assert stats["host_hits"] > 0 and stats["host_misses"] >= 96
    fetches = stats["demand_loads"] + stats["prefetches"]
    assert fetches - stats["prefetches_cancelled"] <= stats["host_hits"] + stats["host_misses"] <= fetches


def test_a_host_tier_that_does_not_fit_is_refused(as_on_gpu, monkeypatch, tmp_path):
    few = HostMemory(1 << 20, "this machine")
    monkeypatch.setattr(host_room, "host_memory", lambda: few)
    with pytest.raises(AdapMoEError, match=r"host_gb=0.01 needs 0.01 GiB .* limited by this machine; set at most"):
        Engine(TINY_MIXTRAL, {"cache_experts": 32, "host_gb": 0.01, "store_dir": str(tmp_path)}, **ARGS)


def test_graphs_are_split_at_moe_blocks(monkeypatch, tiny_model):
    """Compiled, with blocks (one with shared experts) as ops that write into memory of the piece before them."""

    def split(settings: Any, vllm_config: Any, layers: Any, cache: Any) -> None:
        for layer in layers:
            break_graph_at(vllm_config.compilation_config.static_forward_context[layer.layer_name])

    model = tiny_model("deepseek_v2")
    asked, params = prompts(6, 512, seed=2), greedy(logprobs=2)
    with Engine(model, None, **ENGINE_ARGS) as engine:
        expected = answers(engine, asked, params)
    monkeypatch.setattr(gpu_steps.GpuSteps, "of", split)
    with Engine(model, VLLM_STEPS | {"cache_fraction": 0.5}, **ENGINE_ARGS) as engine:
        assert answers(engine, asked, params) == expected


def test_graph_modes():
    """Which CUDA graphs vLLM captures: whole decode steps if they do not ask the host, pieces of others."""
    modes = {
        CUDAGraphMode.FULL: (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE),
        CUDAGraphMode.FULL_AND_PIECEWISE: (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE),
        CUDAGraphMode.FULL_DECODE_ONLY: (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE),
        CUDAGraphMode.PIECEWISE: (CUDAGraphMode.PIECEWISE, CUDAGraphMode.PIECEWISE),
        CUDAGraphMode.NONE: (CUDAGraphMode.NONE, CUDAGraphMode.NONE),
    }
    for mode, (without_host, in_pieces) in modes.items():
        sizes = {"cudagraph_capture_sizes": [1, 8, 64, 128], "max_cudagraph_capture_size": 128}
        config = CompilationConfig(cudagraph_mode=mode, **sizes)
        # Padded to the next piece's size, a step would have more rows than the GPU has room for.
        assert graphs_without_host(config, 40) == (8 if mode == CUDAGraphMode.PIECEWISE else 40)
        config = CompilationConfig(cudagraph_mode=mode, **sizes)
        assert graphs_without_host(config, 64) == 64
        assert config.cudagraph_mode == without_host
        assert config.max_cudagraph_capture_size == (64 if without_host.has_full_cudagraphs() else 128)
        config = CompilationConfig(cudagraph_mode=mode, **sizes)
        graphs_in_pieces(config)
        assert (config.cudagraph_mode, config.cudagraph_capture_sizes) == (in_pieces, [1, 8, 64, 128])


def test_graph_modes_of_models_that_cannot_be_split():
    """Blocks that go through an op of their own, as the Transformers backend's, would run inside a captured piece."""
    other = type("OtherRunner", (MoERunner,), {"forward": lambda self: None})
    assert not break_graph_at(other.__new__(other))
    for mode in CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE:
        config = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8])
        graphs_in_pieces(config, in_pieces=False)
        assert config.cudagraph_mode == CUDAGraphMode.NONE
        config = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8])
        graphs_without_host(config, 64, in_pieces=False)
        whole = mode != CUDAGraphMode.PIECEWISE
        assert config.cudagraph_mode == (CUDAGraphMode.FULL_DECODE_ONLY if whole else CUDAGraphMode.NONE)


def test_padding_is_not_asked_where_vllm_does_not_fill_it_in(monkeypatch):
    context = SimpleNamespace(is_padding=torch.ones(4, dtype=torch.bool))
    assert padding_rows(context, 3).tolist() == [True] * 3
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    assert padding_rows(context, 3) is None


def interpret(script: str, *arguments: str) -> str:
    """Runs a script of this folder in a process of its own, for vLLM looks for Triton once; returns what it printed."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vllms_kernels_on_slots():
    """The same bits as without slots, whatever is in the other slots; what is dropped or in another wave is skipped."""
    interpret("run_slot_kernels.py", "fp16,int8,int4,fp8_channel,fp8_tensor,marlin")


def test_model_runner_v2():
    """Of vLLM, runner V2, whose Triton kernels run in the interpreter: the tokens are the same.

    With vLLM's Triton experts, too, on slots that GPU and host fill in turns: every bit as without the plugin.
    """
    results = json.loads(interpret("run_model_runner_v2.py", str(TINY_MIXTRAL), GATED["profile"]).splitlines()[-1])
    assert results["stock"] == results["cached"] and results["runner"] == "vllm.v1.worker.cpu.model_runner"
    warmed_up = {name: value for name, value in results["warmed_up"].items() if name != "slots"}
    assert not any(warmed_up.values()), "steps of made-up requests count nowhere, and load nothing"
    assert results["stats"]["prefetch_hits"] > 0 and results["stats"]["demand_loads"] > 0
    assert results["requests"] == [["b", 2, 1], ["c", 5, 1], ["a", 0, 3]], "decoding rows come first"

    assert results["on_gpu"] == results["triton"], "tokens and log probabilities"
    assert results["kernels"] == ["TritonExperts"] * 12, "vLLM's own, on slots"
    by_gpu = [[11, False], [2, True], [6, False], [2, True], [1, True]]
    assert results["steps"] == by_gpu, "tokens of prompts and decode steps, and whether the GPU decided"
    assert results["gpu_warmed_up"] == 0 < results["gpu_misses"]
    first, second = results["planted"][0][0]
    expected = results["triton"][0][0]
    assert first == expected[0] and second != expected[1], "weights of other experts, in a step of the GPU, are seen"
