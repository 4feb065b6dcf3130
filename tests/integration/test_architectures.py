"""Ten kinds of router and loader, as tiny random models; every architecture there is: `make models`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY

from tests.apart import apart
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, hidden_states, prompts
from tests.models.checkpoint import save_checkpoint
from tests.models.run_one import expert_layers, least_fraction
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True}
PROMPT = prompts(4, VOCABULARY, seed=6)[-1] + list(range(50, 80))
ASKED = prompts(5, VOCABULARY, seed=1)
KINDS = {
    "Qwen3MoeForCausalLM": "softmax, renormalised",
    "OlmoeForCausalLM": "softmax, not renormalised",
    "DeepseekV3ForCausalLM": "sigmoid with a correction, in groups; shared experts",
    "Lfm2MoeForCausalLM": "sigmoid with a correction; layers without attention and without experts",
    "Llama4ForCausalLM": "a function of the model; weights on the input; experts fused in the checkpoint, transposed",
    "Gemma4ForCausalLM": "a function of the model, a scale for each expert",
    "GraniteMoeForCausalLM": "experts fused in the checkpoint",
    "Qwen2MoeForCausalLM": "a shared expert with a gate of its own",
    "GptOssForCausalLM": "experts with biases; a loader that copies by itself",
}
EVERY_VERSION = {"Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"}
"""Run with every vLLM, beside the Transformers backend: plain, and with shared experts and grouped routing."""


def compare(model: Path, **args: Any) -> None:
    """Half resident: stock's bits. With the fewest slots: what half resident gives where pairs are summed."""
    params = greedy(logprobs=1)
    with Engine(model, None, **(ARGS | args)) as engine:
        stock = answers(engine, ASKED, params)
        layers = engine.llm.collective_rpc(expert_layers)[0]
    with Engine(model, VLLM_STEPS | {"cache_fraction": 0.5}, **(ARGS | args)) as engine:
        assert answers(engine, ASKED, params) == stock
        stats = engine.cache_stats()
        assert stats["misses"] > 0 and stats["resident"] <= stats["slots"]
        summed = check_gating(engine, min(layer[1] for layer in layers))
    with Engine(model, VLLM_STEPS | {"cache_fraction": least_fraction(layers)}, **(ARGS | args)) as engine:
        in_waves = hidden_states(engine, PROMPT)[0].float()
        assert engine.cache_stats()["slots"] < stats["slots"]
    # With AMX the last bit of a row depends on the rows beside it, and a wave has others.
    assert torch.allclose(in_waves, summed, rtol=2**-7, atol=2**-7 * summed.abs().max().item())


def check_gating(engine: Engine, top_k: int) -> torch.Tensor:
    """Whatever the router: threshold zero changes nothing but rounding, an endless one leaves one expert to a token.

    Returns the first block's output under threshold zero.
    """
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
    assert len(set(kept)) == 1 and kept[0] >= top_k, "every expert kept"
    assert engine.call("kept_by_layer") == [1.0] * layers
    assert one_kept.isfinite().all()
    if top_k > 1:
        assert (one_kept - ungated).abs().max() > 3 * (all_kept - ungated).abs().max()
    return all_kept


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.versions if name in EVERY_VERSION else ()) for name in KINDS]
)
def test_architecture(architecture, tmp_path):
    compare(apart(save_checkpoint, architecture, tmp_path / "model"))


@pytest.mark.versions
def test_transformers_backend(tmp_path):
    compare(apart(save_checkpoint, "Qwen3MoeForCausalLM", tmp_path / "model"), model_impl="transformers")
