"""What only a GPU runs, on the CPU: maps instead of pairs, steps that do not wait for the host, model runner V2.

Two things stand in for a GPU's. Experts keep the layout of the checkpoint, as for vLLM's Triton kernel, and that kernel
is a few lines of PyTorch that know its map; Triton's interpreter runs the kernel that reads experts in place.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import TINY_MIXTRAL
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration import loading, mapped_experts
from vllm_adapmoe.integration.engine import Engine
from vllm_adapmoe.kernels import experts_by_address

pytestmark = pytest.mark.engine

VOCABULARY = 2048
ARGS = ENGINE_ARGS | {"enforce_eager": True, "dtype": "float16"}


def run_with_map(self: Any, output: torch.Tensor, hidden_states: torch.Tensor, **given: Any) -> None:
    """Expert by expert; the kernel's map says which row of the weights it has, -1: none."""
    w1, w2, ids, expert_map = given["w1"], given["w2"], given["topk_ids"], given["expert_map"]
    rows = list(range(len(w1))) if expert_map is None else expert_map.tolist()
    assert len(rows) == given["global_num_experts"]
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        if rows[expert] < 0:
            continue
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token].float() @ w1[rows[expert]].float().T).chunk(2, 1)
        outputs = (torch.nn.functional.silu(gate) * up) @ w2[rows[expert]].float().T
        total.index_add_(0, token, outputs * given["topk_weights"][token, choice].unsqueeze(1))
    output.copy_(total)


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
    for cls in (cpu_moe.CPUUnquantizedExperts, cpu_moe.X86CPUUnquantizedExperts):
        monkeypatch.setattr(cls, "apply", run_with_map)
    monkeypatch.setattr(mapped_experts, "KERNELS", {"X86CPUUnquantizedExperts", "CPUUnquantizedExperts"})
    monkeypatch.setattr(loading, "experts_base", lambda: mapped_experts.MappedExperts)


HALF = VLLM_STEPS | {"cache_fraction": 0.5, "store": "host"}


def ask(engine: Engine) -> list[Any]:
    return answers(engine, prompts(4, VOCABULARY, seed=4), greedy(logprobs=2))


def test_maps(as_on_gpu):
    """One wave: to the last bit what the same kernel gives without the plugin."""
    with Engine(TINY_MIXTRAL, None, **ARGS) as engine:
        stock = ask(engine)
    with Engine(TINY_MIXTRAL, HALF | {"decode": "fetch"}, **ARGS) as engine:
        assert ask(engine) == stock
        stats = engine.cache_stats()
    assert stats["misses"] == stats["demand_loads"] + stats["late"] > 0
    print(stats)


SHORT = [[11, 12, 13], [700, 701, 702, 703]]


def short(engine: Engine) -> list[Any]:
    return answers(engine, SHORT, greedy(logprobs=2))


def test_in_place(as_on_gpu, monkeypatch):
    # A thread of its own: at the depth of the engine's calls, Python 3.11 may map and unmap memory with every call.
    kernel, thread = experts_by_address.experts_by_address, ThreadPoolExecutor(1)
    monkeypatch.setattr(experts_by_address, "experts_by_address", lambda *a: thread.submit(kernel, *a).result())
    monkeypatch.setattr(experts_by_address, "BLOCK_N", 64)
    with Engine(TINY_MIXTRAL, HALF | {"decode": "fetch"}, **ARGS) as engine:
        fetched = short(engine)
    with Engine(TINY_MIXTRAL, HALF | {"decode": "in_place"}, **ARGS) as engine:
        first = short(engine)
        stats = engine.cache_stats()
        again = short(engine)
    print(stats, fetched == first, first == again)
    for (tokens, _), (expected, _) in zip(first, fetched, strict=True):
        print(tokens, expected)
