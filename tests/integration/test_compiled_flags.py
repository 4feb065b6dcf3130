"""What a model asks of its experts beyond the plain sum, compiled: the same bits as compiled stock vLLM.

The compiler rounds where it stores, so to the last bit it matters which computations it sees together.
"""

from typing import Any

import pytest
import tiny_models
from tiny_models import COMMON, VOCABULARY, save_tiny_model
from transformers import Llama4TextConfig

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

LLAMA_4 = Llama4TextConfig(
    **COMMON | {"num_hidden_layers": 2}, intermediate_size=64, intermediate_size_mlp=256, head_dim=32,
    num_local_experts=8, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=None,
)  # fmt: skip


CASES = {
    "llama4": "the router's weight multiplies the input",
    "deepseek_v3": "sums are scaled, and shared experts are added",
}


@pytest.mark.parametrize("architecture", CASES)
def test_compiled(architecture, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_models.CONFIGS, "llama4", LLAMA_4)
    model = save_tiny_model(architecture, tmp_path)

    def told(config: dict[str, Any] | None) -> list[Any]:
        with Engine(model, config, **ENGINE_ARGS) as engine:
            return answers(engine, prompts(8, VOCABULARY, seed=1), greedy(logprobs=1))

    stock = told(None)
    assert told(VLLM_STEPS | {"cache_fraction": 0.5}) == stock
