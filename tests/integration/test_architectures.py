"""Each architecture, as a tiny random model: the tokens of stock vLLM with half of the experts resident."""

import os
from typing import Any

import pytest
from tiny_models import CONFIGS, VOCABULARY

from tests.integration.scenarios import ENGINE_ARGS, answers, greedy, prompts
from vllm_adapmoe.integration.engine import Engine

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True}


def tokens_and_stats(model: Any, adapmoe: dict[str, Any] | None, **args: Any) -> tuple[Any, dict[str, float]]:
    with Engine(model, adapmoe, **(ARGS | args)) as engine:
        return answers(engine, prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)), engine.cache_stats()


def compare(model: Any, **args: Any) -> None:
    stock, _ = tokens_and_stats(model, None, **args)
    ours, stats = tokens_and_stats(model, {"cache_fraction": 0.5}, **args)
    assert ours == stock
    assert stats["misses"] > 0 and stats["resident"] <= stats["slots"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_architecture(architecture, tiny_model):
    compare(tiny_model(architecture))


def test_transformers_backend(tiny_model):
    compare(tiny_model("qwen3_moe"), model_impl="transformers")


def test_two_ranks(tiny_model, monkeypatch):
    """Every rank caches its own shard of every expert, and packs a file of its own."""
    cores = sorted(os.sched_getaffinity(0))
    # vLLM places one rank on each NUMA node; on a machine with one, it wants to be told the cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    compare(tiny_model("mixtral"), tensor_parallel_size=2)
