"""The plugin gives what stock vLLM gives, whatever is cached: token for token and tensor for tensor."""

from typing import Any

import pytest
import torch
from conftest import TINY_MIXTRAL

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, everything, hidden_states, prompts
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

VOCABULARY = 2048
EXPERTS = 96
PROMPT = prompts(6, VOCABULARY, seed=9)[-1] + list(range(100, 140))


def engine(adapmoe: dict[str, Any] | None, eager: bool) -> Engine:
    return Engine(TINY_MIXTRAL, adapmoe and VLLM_STEPS | adapmoe, enforce_eager=eager, **ENGINE_ARGS)


@pytest.fixture(scope="module")
def stock():
    """What stock vLLM answers, eager and compiled, and the outputs of its MoE blocks."""
    answers = {}
    for eager in (True, False):
        with engine(None, eager) as running:
            answers[eager] = [everything(running, VOCABULARY) for _ in range(2)]
            if eager:
                answers["tensors"] = hidden_states(running, PROMPT)
    return answers


@pytest.mark.parametrize(
    ("config", "eager"),
    [
        pytest.param({"cache_experts": EXPERTS}, False, id="all-compiled"),
        pytest.param(
            {"cache_experts": EXPERTS // 2, "store": "file"}, False, id="half-file-compiled", marks=pytest.mark.versions
        ),
        pytest.param({"cache_fraction": 0.5, "store": "host"}, True, id="half-host-eager", marks=pytest.mark.versions),
        pytest.param({"cache_experts": 8, "store": "file"}, True, id="one-layer-file-eager"),
    ],
)
def test_one_wave_is_bit_identical(stock, config, eager):
    with engine(config, eager) as running:
        for expected in stock[eager]:  # the second time with another cache content, and with a warm prefix cache
            answers = everything(running, VOCABULARY)
            for name, wanted in expected.items():
                assert answers[name] == wanted, name
        stats = running.cache_stats()
        if eager:
            for ours, theirs in zip(hidden_states(running, PROMPT), stock["tensors"], strict=True):
                assert torch.equal(ours, theirs)
    if config.get("cache_experts") == EXPERTS:
        assert stats == {}
    else:
        assert stats["misses"] > 0
        assert stats["hits"] > 0 or stats["slots"] == 8  # one layer's worth is gone before the layer's next turn
        demanded = stats["misses"] - stats["late"]
        record = 3 * 128 * 256 * 2
        assert demanded * record <= stats["fetched_bytes"] <= (demanded + stats["prefetches"]) * record
        assert (stats["prefetches"] > 0) == (stats["slots"] > 8)  # one layer's worth leaves no slot for staging


def rounding_noise(stock) -> float:
    """How far stock vLLM's own log probabilities move between eager and compiled, which round at different places."""
    noise = 0.0
    for size in (1, 8, 16):
        pairs = zip(stock[True][0][f"batch of {size}"], stock[False][0][f"batch of {size}"], strict=True)
        for (eager, eager_chances), (compiled, compiled_chances) in pairs:
            for position, (token, other) in enumerate(zip(eager, compiled, strict=True)):
                one, two = eager_chances[position], compiled_chances[position]
                noise = max([noise, *(abs(one[key] - two[key]) for key in one.keys() & two.keys())])
                if token != other:
                    break
    return noise


@pytest.mark.parametrize(
    "eager", [pytest.param(True, id="eager", marks=pytest.mark.versions), pytest.param(False, id="compiled")]
)
def test_several_waves_are_equal_within_rounding(stock, eager):
    """With top-k slots for all layers together nearly every step needs several waves."""
    with engine({"cache_experts": 2, "store": "host"}, eager) as running:
        answers = everything(running, VOCABULARY)
        running.llm.reset_prefix_cache()
        again = everything(running, VOCABULARY)  # from another cache content
        tensors = hidden_states(running, PROMPT) if eager else []
    if eager:
        # The first layer sees the same input: what differs is one rounding to bf16 of each expert's output.
        ours, theirs = tensors[0].float(), stock["tensors"][0].float()
        assert torch.allclose(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())
    noise = rounding_noise(stock)
    for size in (1, 8, 16):
        ours, theirs = answers[f"batch of {size}"], stock[eager][0][f"batch of {size}"]
        for (tokens, _), (expected, logprobs) in zip(ours, theirs, strict=True):
            for position, (token, wanted) in enumerate(zip(tokens, expected, strict=True)):
                if token != wanted:  # only where stock's own choice was a tie within rounding
                    chances = logprobs[position]
                    assert token in chances, (size, position)
                    assert chances[wanted] - chances[token] <= 2 * noise, (size, position, noise)
                    break
        assert again[f"batch of {size}"] == ours
