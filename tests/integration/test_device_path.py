"""What only a GPU runs, on the CPU: maps instead of pairs, steps that do not wait for the host, model runner V2.

Two things stand in for a GPU's. Experts keep the layout of the checkpoint, as for vLLM's Triton kernel, and that kernel
is a few lines of PyTorch that know its map; Triton's interpreter runs the kernel that reads experts in place.
"""

from typing import Any

import pytest
import torch
from conftest import TINY_MIXTRAL
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration import loading, mapped_experts
from vllm_adapmoe.integration.engine import Engine

pytestmark = pytest.mark.engine

VOCABULARY = 2048
ARGS = ENGINE_ARGS | {"enforce_eager": True, "dtype": "float16"}


def run_with_map(self: Any, output: torch.Tensor, hidden_states: torch.Tensor, **given: Any) -> None:
    """Pairs of token and expert one by one; the kernel's map says which row of the weights, -1: none."""
    w1, w2, weights, expert_map = given["w1"], given["w2"], given["topk_weights"], given["expert_map"]
    assert expert_map is None or len(expert_map) == given["global_num_experts"]
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for token, chosen in enumerate(given["topk_ids"].tolist()):
        for choice, expert in enumerate(chosen):
            row = expert if expert_map is None else int(expert_map[expert])
            if row < 0:
                continue
            gate, up = (w1[row].float() @ hidden_states[token].float()).chunk(2)
            total[token] += weights[token, choice] * (w2[row].float() @ (torch.nn.functional.silu(gate) * up))
    output.copy_(total)


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
    for cls in (cpu_moe.CPUUnquantizedExperts, cpu_moe.X86CPUUnquantizedExperts):
        monkeypatch.setattr(cls, "apply", run_with_map)
    monkeypatch.setattr(mapped_experts, "KERNELS", {"X86CPUUnquantizedExperts", "CPUUnquantizedExperts"})
    monkeypatch.setattr(loading, "experts_base", lambda: mapped_experts.MappedExperts)


def ask(engine: Engine) -> list[Any]:
    return answers(engine, prompts(4, VOCABULARY, seed=4), greedy(logprobs=2))


def test_maps(as_on_gpu):
    with Engine(TINY_MIXTRAL, None, **ARGS) as engine:
        stock = ask(engine)
    with Engine(TINY_MIXTRAL, VLLM_STEPS | {"cache_fraction": 0.5, "store": "host"}, **ARGS) as engine:
        assert ask(engine) == stock
        stats = engine.cache_stats()
        print(stats)
    assert stats["misses"] > 0
