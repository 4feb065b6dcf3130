"""What the benchmarks ask of an engine: the same prompts, round after round."""

import json
import random
from pathlib import Path
from typing import Any

from vllm_adapmoe.bench.record import spread


def prompts_of(model: Path, text: Path | None, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` token ids: excerpts of the files `*.txt` in the folder `text`, or random ids.

    Routing has structure only on text like that which the model was trained on.
    """
    generator = random.Random(0)
    if text is not None:
        texts = sorted(text.glob("*.txt"))
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        pools = [tokenizer.encode(path.read_text(errors="replace"), add_special_tokens=False).ids for path in texts]
        prompts = []
        for number in range(count):
            pool = pools[number % len(pools)]
            start = generator.randrange(max(1, len(pool) - length))
            prompts.append(pool[start : start + length])
        return prompts
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return [[generator.randrange(2, vocabulary) for _ in range(length)] for _ in range(count)]


def measure(engine: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Throughput of one round, tokens/s, and what the cache did in it."""
    before = engine.cache_stats()
    run = engine.generate(prompts, output_tokens)
    after = engine.cache_stats()
    counts = {key: after[key] - before[key] for key in ("hits", "misses", "fetched_bytes", "stall_seconds") if after}
    decoded = len(prompts) * (output_tokens - 1)
    return {
        "tokens": run.tokens,
        "prefill_tokens_per_second": sum(map(len, prompts)) / run.prefill_seconds,
        "decode_tokens_per_second": decoded / run.decode_seconds,
        "cache": counts,
    }


def ratios(rounds: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Spread of a figure of `rounds` over that of `base`, round by round."""
    return spread([round[key] / other[key] for round, other in zip(rounds, base, strict=True)])
