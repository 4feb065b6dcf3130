"""What `make models` found is what `docs/compatibility.md` says, of every architecture that there is."""

import json
from importlib.metadata import version

import pytest
from transformers.models.qwen3_vl_moe import Qwen3VLMoeConfig

from tests.models.architectures import moe_architectures
from tests.models.run_one import compare, least_fraction
from tests.models.table import BEGIN, DOCUMENT, END, RESULT, markdown, verdict
from tests.models.tiny_config import tiny_config


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text())


def test_document_has_the_result(result):
    _, _, rest = DOCUMENT.read_text().partition(BEGIN)
    assert rest.partition(END)[0].strip() == markdown(result), "run python -m tests.models.table"


@pytest.mark.engine
def test_every_architecture_with_experts_is_in_the_result(result):
    if result["environment"]["versions"]["vllm"] != version("vllm"):
        pytest.skip("another vLLM's registry")
    names = {one.name for one in moe_architectures()}
    assert names == set(result["models"])
    assert {"MixtralForCausalLM", "Llama4ForConditionalGeneration", "DeepSeekMTPModel", "ZayaForCausalLM"} <= names
    assert not names & {"LlamaForCausalLM", "Qwen2ForCausalLM", "LlavaForConditionalGeneration", "ArceeForCausalLM"}


def answer(*tokens: int, prompt: float = -1.0) -> dict:
    return {"tokens": list(tokens), "logprobs": [{token: -0.5} for token in tokens], "prompt": [prompt, -2.0, -3.0]}


def test_comparison_sees_tokens_and_log_probabilities():
    same = compare([answer(5, 6)], [answer(5, 6)])
    assert same == {"equal": 2, "tokens": 2, "difference": 0.0, "median": 0.0}
    assert compare([answer(5, 6, 7)], [answer(5, 9, 7)])["equal"] == 1  # what follows has seen other tokens
    moved = compare([answer(5, 6)], [answer(5, 6, prompt=-1.25)])
    assert (moved["difference"], moved["median"]) == (0.25, 0.0)


def test_verdicts():
    exact = {"equal": 48, "tokens": 48, "difference": 0.0, "median": 0.0}
    rounded = exact | {"equal": 40, "difference": 1.5, "median": 0.02}
    assert verdict({"half": {"stock": exact}}, "half") == "same bits"
    assert verdict({"half": {"stock": rounded, "pairs": exact}}, "half").startswith("**differs**")
    assert verdict({"fewest": {"stock": rounded, "pairs": exact}}, "fewest") == "rounding, 40 of 48 tokens"
    assert verdict({"fewest": {"stock": rounded, "pairs": rounded}}, "fewest").startswith("**differs**")
    assert verdict({"fewest": {"stock": rounded}}, "fewest").startswith("**differs**"), "nothing to hold it against"
    assert verdict({"half": {"error": "IndexError: 8"}}, "half") == "**error**"
    assert verdict({}, "half") == "**error**"


def test_fewest_slots_are_those_of_one_token_in_every_pool():
    assert least_fraction([(8, 2, 100)] * 4) == 2 / 32
    assert least_fraction([(8, 2, 100), (8, 2, 100), (4, 1, 50)]) == 1 / 4


def test_a_tiny_config_is_small_at_every_level():
    config = tiny_config(Qwen3VLMoeConfig)
    assert config.text_config.hidden_size == 128 and config.text_config.num_experts == 8
    assert config.vision_config.depth == 2 and config.image_token_id < 512
    assert tiny_config(Qwen3VLMoeConfig, text_config={"head_dim": 64}).text_config.head_dim == 64
