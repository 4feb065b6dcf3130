"""Measures fetch on demand without prefetch: 25, 50 and 75 % of the experts resident, against all of them."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.workload import Workload, measure, ratios
from vllm_adapmoe.results import spread
from vllm_adapmoe.units import GiB

FRACTIONS = (0.25, 0.5, 0.75)
STORES = ("file", "host")
ON_DEMAND = {"eviction": "lru", "prefetch": {"lookahead": 0}, "decode": "host"}
"""Settings of the baseline: demand loads only, no prefetch, and LRU eviction."""


def budget_of(fraction: float, experts: int, expert_bytes: int) -> dict[str, Any]:
    """Returns the budget, in bytes, of the slots that `cache_fraction` gives experts of this size."""
    return {"cache_gb": int(fraction * experts + 1e-9) * expert_bytes / GiB}


def run_residency(
    workload: Workload, stores: Sequence[str] = STORES, precisions: Sequence[int] = (), enforce_eager: bool = False
) -> dict[str, Any]:
    """Measures an engine for each precision, store and residency, interleaved with one that has every expert resident.

    Args:
        workload: the requests.
        stores: backing stores of the engines.
        precisions: values of the key `precision` to compare with 16: with slots of as many bytes, and with every expert
            resident.
        enforce_eager: as of vLLM.
    """
    from vllm_adapmoe.integration.measure.engine import Engine, count_experts

    experts, output_tokens = count_experts(workload.model), workload.output_tokens
    tokens = workload.batch * output_tokens
    prompts = workload.prompts()
    arguments: dict[str, Any] = {"max_model_len": workload.length, "enforce_eager": enforce_eager}
    points, expert_bytes = [], 0
    total = (len(stores) * len(FRACTIONS) * (1 + len(precisions))) + len(precisions)
    with (
        tqdm(total=total, desc="Measuring", unit="engine") as bar,
        Engine(workload.model, {"cache_fraction": 1.0}, **arguments) as full,
    ):
        measure(full, prompts, output_tokens)

        def compared(config: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
            measured, base = [], []
            with Engine(workload.model, ON_DEMAND | config, **arguments) as engine:
                measure(engine, prompts, output_tokens)
                for _ in range(workload.rounds):
                    base.append(measure(full, prompts, output_tokens))
                    measured.append(measure(engine, prompts, output_tokens))
                nbytes = engine.call("largest_expert_bytes") if engine.cache_stats() else 0
            bar.update()
            return measured, base, nbytes

        for precision in (16, *precisions):
            for store in stores:
                for fraction in FRACTIONS:
                    budget: dict[str, Any] = {"cache_fraction": fraction}
                    if precision != 16:
                        budget = budget_of(fraction, experts, expert_bytes)
                    measured, base, nbytes = compared(budget | {"store": store, "precision": precision})
                    expert_bytes = expert_bytes or nbytes
                    points.append(_point(precision, store, fraction, measured, base, tokens))
            if precision != 16:
                measured, base, _ = compared({"cache_fraction": 1.0, "precision": precision})
            points.append(_point(precision, "none", 1.0, base if precision == 16 else measured, base, tokens))
    return {
        "benchmark": "residency",
        **workload.described(),
        "enforce_eager": enforce_eager,
        "expert_bytes": expert_bytes,
        "points": points,
    }


def _point(
    precision: int,
    store: str,
    fraction: float,
    rounds: list[dict[str, Any]],
    base: list[dict[str, Any]],
    tokens: int,
) -> dict[str, Any]:
    counts = [result["cache"] for result in rounds if result["cache"]]
    same = all(result["tokens"] == reference["tokens"] for result, reference in zip(rounds, base, strict=True))
    return {
        "precision": precision,
        "store": store,
        "resident": fraction,
        "same_tokens": same if precision == 16 else None,
        "decode_tokens_per_second": spread([result["decode_tokens_per_second"] for result in rounds]),
        "prefill_tokens_per_second": spread([result["prefill_tokens_per_second"] for result in rounds]),
        "decode_ratio": ratios(rounds, base, "decode_tokens_per_second"),
        "prefill_ratio": ratios(rounds, base, "prefill_tokens_per_second"),
        "hit_rate": spread([count["hits"] / (count["hits"] + count["misses"]) for count in counts]) if counts else None,
        "fetched_bytes_per_token": spread([count["fetched_bytes"] / tokens for count in counts]) if counts else None,
    }


def print_residency(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(
        title=f"Share of the experts' bytes resident, batch {result['batch']}, {result['model']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = (
        "bits",
        "store",
        "resident",
        "decode tok/s",
        "of all",
        "min .. max",
        "prefill",
        "of all",
        "hits",
        "MiB/token",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        ratio, hits, fetched = point["decode_ratio"], point["hit_rate"], point["fetched_bytes_per_token"]
        table.add_row(
            str(point["precision"]),
            point["store"],
            f"{point['resident']:.0%}",
            f"{point['decode_tokens_per_second']['median']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['min']:.3f} .. {ratio['max']:.3f}",
            f"{point['prefill_tokens_per_second']['median']:.0f}",
            f"{point['prefill_ratio']['median']:.3f}",
            f"{hits['median']:.1%}" if hits else "all",
            f"{fetched['median'] / 2**20:.2f}" if fetched else "0",
        )
    console.print(table)
    same = all(point["same_tokens"] for point in result["points"] if point["precision"] == 16)
    console.print("of all: of the tokens/s with every expert resident in 16 bits")
    console.print("same tokens at 16 bits:", "yes" if same else "[red]NO[/red]")
