"""Measures the loss of given tokens in a serving engine: as prompts (prefill), or forced one by one (decode)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_adapmoe.integration.measure.engine import Engine


@dataclass(frozen=True)
class Losses:
    """Losses of all measured tokens of the sequences, in order."""

    nats: np.ndarray
    """Negative log probability of the text's token, `[tokens]`, float64."""
    best: np.ndarray
    """Most probable token according to the model, `[tokens]`, int64."""


def prefill_losses(engine: Engine, sequences: Sequence[Sequence[int]]) -> Losses:
    """Measures every token after the first of each sequence, with each sequence as one prompt."""
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in sequences],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, flat_logprobs=True, detokenize=False),
        use_tqdm=False,
    )
    return _losses([output.prompt_logprobs for output in outputs], first=1)


def decode_losses(engine: Engine, sequences: Sequence[Sequence[int]], prompt_tokens: int) -> Losses:
    """Measures the tokens after the first `prompt_tokens` of each sequence, which are its prompt, in decode steps.

    All requests run together. The engine must have been made with `forced`.
    """
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=list(ids[:prompt_tokens])) for ids in sequences],
        [
            engine.params(len(ids) - prompt_tokens, list(ids[prompt_tokens:]), logprobs=1, flat_logprobs=True)
            for ids in sequences
        ],
        use_tqdm=False,
    )
    for ids, output in zip(sequences, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == list(ids[prompt_tokens:])
    return _losses([output.outputs[0].logprobs for output in outputs], first=0)


def _losses(logprobs: list[Any], first: int) -> Losses:
    """Reads losses from `FlatLogprobs`, which hold the text's token first at each position, then the most probable."""
    nats, best = [], []
    for flat in logprobs:
        starts = flat.start_indices[first:]
        nats += [-flat.logprobs[start] for start in starts]
        best += [flat.token_ids[start + 1] for start in starts]
    return Losses(np.array(nats), np.array(best))
