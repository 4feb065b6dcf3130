"""Each architecture, as a tiny random model: the tokens of stock vLLM with half of the experts resident, and gated."""

from typing import Any

import pytest
from tiny_models import CONFIGS, VOCABULARY

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, hidden_states, prompts
from vllm_adapmoe.integration.engine import Engine

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True}
PROMPT = prompts(4, VOCABULARY, seed=6)[-1] + list(range(50, 80))


def compare(model: Any, **args: Any) -> None:
    asked, params = prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)
    with Engine(model, None, **(ARGS | args)) as engine:
        stock = answers(engine, asked, params)
    with Engine(model, VLLM_STEPS | {"cache_fraction": 0.5}, **(ARGS | args)) as engine:
        assert answers(engine, asked, params) == stock
        stats = engine.cache_stats()
        assert stats["misses"] > 0 and stats["resident"] <= stats["slots"]
        check_gating(engine)


def check_gating(engine: Engine) -> None:
    """Whatever the router: threshold zero changes nothing but rounding, an endless one leaves one expert to a token."""
    layers = engine.llm.collective_rpc(lambda worker: len(worker.moe_layers))[0]
    plan = {"rule": "token", "threshold": 0.0, "sensitivity": [1.0] * layers}
    ungated = hidden_states(engine, PROMPT)[0].float()
    engine.call("set_gating", plan)
    all_kept = hidden_states(engine, PROMPT)[0].float()
    kept = engine.call("kept_by_layer")
    engine.call("set_gating", plan | {"threshold": 1e9})
    one_kept = hidden_states(engine, PROMPT)[0].float()
    noise = (all_kept - ungated).abs().max() / ungated.abs().max()
    assert noise < 0.02, "a pair of token and expert is rounded to bf16 before the sum"
    assert len(set(kept)) == 1 and kept[0] >= 2, "every expert kept"
    assert engine.call("kept_by_layer") == [1.0] * layers
    assert one_kept.isfinite().all()
    assert (one_kept - ungated).abs().max() > 3 * (all_kept - ungated).abs().max()


SAMPLE = {"qwen3_moe", "deepseek_v3"}
"""Run with every vLLM, beside the Transformers backend: plain, and with shared experts and grouped routing."""


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.versions if name in SAMPLE else ()) for name in CONFIGS]
)
def test_architecture(architecture, tiny_model):
    compare(tiny_model(architecture))


@pytest.mark.versions
def test_transformers_backend(tiny_model):
    compare(tiny_model("qwen3_moe"), model_impl="transformers")
