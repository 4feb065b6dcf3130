"""Makes the benchmarks' prompts, the same in every round, and measures engines on them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adapmoe.calibrate.text import text_of
from vllm_adapmoe.model_folder import read_tokenizer, vocabulary_size
from vllm_adapmoe.results import spread

COUNTERS = (
    "hits",
    "misses",
    "demand_loads",
    "prefetches",
    "fetched_bytes",
    "wasted_bytes",
    "stall_seconds",
    "fetch_seconds",
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that engines are measured on, in every round the same."""

    model: Path
    """Checkpoint folder."""
    text: Path | None
    """Folder of `*.txt` for prompts; None: random tokens."""
    rounds: int
    """Measurements of every configuration."""
    batch: int
    """Requests per batch."""
    prompt_tokens: int
    """Prompt tokens per request."""
    output_tokens: int
    """Output tokens per request."""

    @property
    def length(self) -> int:
        """Tokens per request, prompt and output."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self) -> list[list[int]]:
        """Returns the token ids of the prompts of one batch."""
        return prompts_of(self.model, self.text, self.batch, self.prompt_tokens)

    def described(self) -> dict[str, Any]:
        """Returns the part of a result that describes the workload."""
        return {
            "model": str(self.model),
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
        }


def prompts_of(model: Path, text: Path | None, count: int, length: int) -> list[list[int]]:
    """Returns `count` prompts of `length` token ids: excerpts of `*.txt` in the folder `text`, or random ids if None.

    Routing is realistic only on text like the model's training data.
    """
    generator = random.Random(0)
    if text is not None:
        texts = sorted(text.glob("*.txt"))
        tokenizer = read_tokenizer(model)
        pools = [tokenizer.encode(text_of(path), add_special_tokens=False).ids for path in texts]
        prompts = []
        for number in range(count):
            pool = pools[number % len(pools)]
            start = generator.randrange(max(1, len(pool) - length))
            prompts.append(pool[start : start + length])
        return prompts
    vocabulary = vocabulary_size(model)
    return [[generator.randrange(2, vocabulary) for _ in range(length)] for _ in range(count)]


def measure(engine: Any, prompts: list[list[int]], output_tokens: int, forced: bool = False) -> dict[str, Any]:
    """Measures the throughput of one round, tokens/s, and the cache's counters in it.

    Args:
        engine: the engine to measure.
        prompts: token ids of each prompt.
        output_tokens: output tokens per request.
        forced: the last `output_tokens` of each prompt are decoded one by one, in place of tokens that the engine would
            generate.
    """
    before = engine.cache_stats()
    answers = [prompt[-output_tokens:] for prompt in prompts] if forced else None
    if forced:
        prompts = [prompt[:-output_tokens] for prompt in prompts]
    run = engine.generate(prompts, output_tokens, answers)
    after = engine.cache_stats()
    counts = {key: after[key] - before[key] for key in COUNTERS if after}
    decoded = len(prompts) * (output_tokens - 1)
    return {
        "tokens": run.tokens,
        "prefill_tokens_per_second": sum(map(len, prompts)) / run.prefill_seconds,
        "decode_tokens_per_second": decoded / run.decode_seconds,
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "cache": counts,
    }


def measure_batches(
    engine: Any, groups: list[list[list[int]]], output_tokens: int, forced: bool = False
) -> dict[str, Any]:
    """Applies `measure` to several batches, one after another, and merges the results."""
    parts = [measure(engine, group, output_tokens, forced) for group in groups]
    decoded = sum(len(group) * (output_tokens - 1) for group in groups)
    prompt_tokens = sum(len(prompt) for group in groups for prompt in group)
    return {
        "tokens": [tokens for part in parts for tokens in part["tokens"]],
        "prefill_tokens_per_second": prompt_tokens / sum(part["prefill_seconds"] for part in parts),
        "decode_tokens_per_second": decoded / sum(part["decode_seconds"] for part in parts),
        "seconds": sum(part["prefill_seconds"] + part["decode_seconds"] for part in parts),
        "cache": {key: sum(part["cache"][key] for part in parts) for key in parts[0]["cache"]},
    }


def ratios(rounds: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Returns the spread of a figure of `rounds` divided by that of `base`, round by round."""
    return spread([measured[key] / reference[key] for measured, reference in zip(rounds, base, strict=True)])
