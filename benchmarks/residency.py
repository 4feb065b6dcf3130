"""Measures fetch on demand without prefetch: 25, 50 and 75 % of the experts resident, against all of them."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import measure, prompts_of, ratios
from vllm_adapmoe.results import spread

FRACTIONS = (0.25, 0.5, 0.75)
STORES = ("file", "host")
ON_DEMAND = {"eviction": "lru", "prefetch": {"lookahead": 0}, "decode": "fetch"}
"""Settings of the baseline: demand loads only, no prefetch, and LRU eviction."""


def run_residency(
    model: Path, text: Path | None, rounds: int, prompt_tokens: int, output_tokens: int, batch: int
) -> dict[str, Any]:
    """Measures an engine for each store and residency, interleaved with one that has every expert resident."""
    from vllm_adapmoe.integration.measure.engine import Engine

    prompts = prompts_of(model, text, batch, prompt_tokens)
    length = prompt_tokens + output_tokens
    points = []
    with Engine(model, {"cache_fraction": 1.0}, max_model_len=length) as full:
        measure(full, prompts, output_tokens)
        for store in STORES:
            for fraction in FRACTIONS:
                config = ON_DEMAND | {"cache_fraction": fraction, "store": store}
                measured, base = [], []
                with Engine(model, config, max_model_len=length) as engine:
                    measure(engine, prompts, output_tokens)
                    for _ in range(rounds):
                        base.append(measure(full, prompts, output_tokens))
                        measured.append(measure(engine, prompts, output_tokens))
                points.append(_point(store, fraction, measured, base, batch * output_tokens))
        points.append(_point("none", 1.0, base, base, batch * output_tokens))
    return {
        "benchmark": "residency",
        "model": str(model),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "points": points,
    }


def _point(
    store: str, fraction: float, rounds: list[dict[str, Any]], base: list[dict[str, Any]], tokens: int
) -> dict[str, Any]:
    cache = [round["cache"] for round in rounds if round["cache"]]
    return {
        "store": store,
        "resident": fraction,
        "same_tokens": all(round["tokens"] == other["tokens"] for round, other in zip(rounds, base, strict=True)),
        "decode_tokens_per_second": spread([round["decode_tokens_per_second"] for round in rounds]),
        "decode_ratio": ratios(rounds, base, "decode_tokens_per_second"),
        "prefill_ratio": ratios(rounds, base, "prefill_tokens_per_second"),
        "hit_rate": spread([c["hits"] / (c["hits"] + c["misses"]) for c in cache]) if cache else None,
        "fetched_bytes_per_token": spread([c["fetched_bytes"] / tokens for c in cache]) if cache else None,
    }


def print_residency(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Share of experts resident, batch {result['batch']}, {result['model']}")
    for column in ("store", "resident", "decode tok/s", "of all resident", "min .. max", "hit rate", "MiB/token"):
        table.add_column(column, justify="right")
    for point in result["points"]:
        ratio, hits, fetched = point["decode_ratio"], point["hit_rate"], point["fetched_bytes_per_token"]
        table.add_row(
            point["store"],
            f"{point['resident']:.0%}",
            f"{point['decode_tokens_per_second']['median']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['min']:.3f} .. {ratio['max']:.3f}",
            f"{hits['median']:.1%}" if hits else "all",
            f"{fetched['median'] / 2**20:.2f}" if fetched else "0",
        )
    console.print(table)
    same = all(point["same_tokens"] for point in result["points"])
    console.print("same tokens at every point:", "yes" if same else "[red]NO[/red]")
