"""Measures fetch on demand without prefetch: 25, 50 and 75 % of the experts resident, against all of them."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload, measure, ratios
from vllm_adapmoe.results import spread

FRACTIONS = (0.25, 0.5, 0.75)
STORES = ("file", "host")
ON_DEMAND = {"eviction": "lru", "prefetch": {"lookahead": 0}, "decode": "fetch"}
"""Settings of the baseline: demand loads only, no prefetch, and LRU eviction."""


def run_residency(workload: Workload) -> dict[str, Any]:
    """Measures an engine for each store and residency, interleaved with one that has every expert resident."""
    from vllm_adapmoe.integration.measure.engine import Engine

    model, length, output_tokens = workload.model, workload.length, workload.output_tokens
    prompts = workload.prompts()
    points = []
    with Engine(model, {"cache_fraction": 1.0}, max_model_len=length) as full:
        measure(full, prompts, output_tokens)
        for store in STORES:
            for fraction in FRACTIONS:
                config = ON_DEMAND | {"cache_fraction": fraction, "store": store}
                measured, base = [], []
                with Engine(model, config, max_model_len=length) as engine:
                    measure(engine, prompts, output_tokens)
                    for _ in range(workload.rounds):
                        base.append(measure(full, prompts, output_tokens))
                        measured.append(measure(engine, prompts, output_tokens))
                points.append(_point(store, fraction, measured, base, workload.batch * output_tokens))
        points.append(_point("none", 1.0, base, base, workload.batch * output_tokens))
    return {"benchmark": "residency", **workload.described(), "points": points}


def _point(
    store: str, fraction: float, rounds: list[dict[str, Any]], base: list[dict[str, Any]], tokens: int
) -> dict[str, Any]:
    counts = [result["cache"] for result in rounds if result["cache"]]
    return {
        "store": store,
        "resident": fraction,
        "same_tokens": all(
            result["tokens"] == reference["tokens"] for result, reference in zip(rounds, base, strict=True)
        ),
        "decode_tokens_per_second": spread([result["decode_tokens_per_second"] for result in rounds]),
        "decode_ratio": ratios(rounds, base, "decode_tokens_per_second"),
        "prefill_ratio": ratios(rounds, base, "prefill_tokens_per_second"),
        "hit_rate": spread([count["hits"] / (count["hits"] + count["misses"]) for count in counts]) if counts else None,
        "fetched_bytes_per_token": spread([count["fetched_bytes"] / tokens for count in counts]) if counts else None,
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
