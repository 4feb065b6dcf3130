"""Models that are more, or less, than a text generator: stock's vectors, to the last bit, and stock's tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MIXTRAL
from PIL import Image
from tiny_models import VOCABULARY, save_tiny_model
from tiny_multimodal import IMAGE_PIXELS, IMAGE_TOKEN, save_tiny_aria
from transformers import AutoModelForSequenceClassification
from vllm import PoolingParams

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.measure.engine import Engine, describe_model

pytestmark = pytest.mark.engine

HALF = VLLM_STEPS | {"cache_fraction": 0.5}
EAGER = ENGINE_ARGS | {"enforce_eager": True}
POOLING = EAGER | {
    "runner": "pooling",
    "enable_prefix_caching": False,
    "skip_tokenizer_init": False,  # vLLM asks for one, though none is used
    "tokenizer": str(TINY_MIXTRAL),
}
ASKED = [[token if token > 20 else 20 + token for token in ids] for ids in prompts(6, VOCABULARY, seed=1)]


def vectors(engine: Engine, task: Any) -> list[torch.Tensor]:
    """What each prompt, or each of its tokens, becomes."""
    core = engine.llm.llm_engine
    for number, ids in enumerate(ASKED):
        core.add_request(str(number), {"prompt_token_ids": ids}, PoolingParams(task=task))
    made: dict[str, torch.Tensor] = {}
    while core.has_unfinished_requests():
        made |= {output.request_id: output.outputs.data for output in core.step() if output.finished}
    return [made[str(number)] for number in range(len(ASKED))]


def compare(model: Path, tasks: list[str], **args: Any) -> None:
    with Engine(model, None, **POOLING | args) as engine:
        stock = [vectors(engine, task) for task in tasks]
    with Engine(model, HALF, **POOLING | args) as engine:
        for task, expected in zip(tasks, stock, strict=True):
            made = vectors(engine, task)
            assert all(one.isfinite().all() and one.numel() > 1 for one in made)
            assert all(map(torch.equal, made, expected))
        assert engine.cache_stats()["misses"] > 0


def test_pooling_embeddings_of_the_transformers_backend(tiny_model):
    """A pooling model of that backend has no `compute_logits`."""
    compare(tiny_model("qwen3_moe"), ["embed", "token_embed"], convert="embed", model_impl="transformers")


def test_pooling_classes_and_rewards(tmp_path):
    """There is no profile of such a model: no token is predicted, of which the loss could be measured."""
    model = save_tiny_model("mixtral", tmp_path, made_by=AutoModelForSequenceClassification)
    with pytest.raises(AdapMoEError, match=r"is a pooling model, .* serve it without a profile"):
        describe_model(model)
    compare(model, ["classify", "token_classify"])


def test_multimodal_with_images(tmp_path):
    """Aria: the name of its MoE layers is not the path of the modules that hold them."""
    model, args = save_tiny_aria(tmp_path), EAGER | {"limit_mm_per_prompt": {"image": 1}, "skip_tokenizer_init": False}
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGE_PIXELS, IMAGE_PIXELS, 3), dtype=np.uint8)
    seen = [
        {"prompt_token_ids": [50, 60, IMAGE_TOKEN, 70], "multi_modal_data": {"image": Image.fromarray(image)}}
        for image in (pixels, pixels[::-1].copy())
    ]

    def said(engine: Engine) -> list[Any]:
        outputs = engine.llm.generate(seen, greedy(), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with Engine(model, None, **args) as engine:
        stock = said(engine), answers(engine, ASKED, greedy(logprobs=1))
    assert stock[0][0] != stock[0][1], "what is in the image matters"
    with Engine(model, HALF, **args) as engine:
        assert (said(engine), answers(engine, ASKED, greedy(logprobs=1))) == stock
        assert engine.cache_stats()["prefetch_hits"] > 0
