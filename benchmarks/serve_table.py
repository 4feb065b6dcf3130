"""Prints and plots the result of `python -m benchmarks serve`."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.plot import figure
from vllm_adapmoe.units import MiB

SHORT = {"ours": "ours", "vllm_order": "order", "ungated": "ungated", "on_demand_lru": "LRU", "stock": "stock"}


def print_serve(result: dict[str, Any], console: Console) -> None:
    """Prints a table of speeds, one of ratios, and the bounds."""
    low, high = result["prompt_tokens"]
    table = Table(
        title=f"{result['model']}, prompts of {low} to {high} tokens, answers of {result['output_tokens']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("N", "", "tok/s", "TTFT 50", "99", "TPOT 50", "99", "ITL 99", "hits", "MiB", "stall"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for load in result["loads"]:
        for number, (name, point) in enumerate(load["contenders"].items()):
            table.add_row(
                "" if number else str(load["concurrency"]),
                SHORT[name],
                f"{point['output_tokens_per_second']['median']:.1f}",
                *(
                    f"{point[key]['median']:.0f}"
                    for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
                ),
                *_cache_cells(point),
            )
    console.print(table)
    console.print(
        "N: concurrent requests; TTFT, TPOT, ITL: ms, p50 and p99; MiB: fetched per output token; stall: share of "
        "the time that layers wait for experts; order: the same in vLLM's order; LRU: on demand, in vLLM's order",
        highlight=False,
    )
    for load in result["loads"]:
        _print_offered(load, result["offered_requests_per_second"], console)
    _print_ratios(result, console)
    for name, bound in result["bounds"].items():
        alone = bound["bound_tokens_per_second"]
        limit = "no limit" if alone is None else f"{alone:.1f} tokens/s"
        console.print(
            f"{name}, {bound['concurrency']} at once: {bound['measured_tokens_per_second']:.1f} tokens/s, "
            f"{bound['moved_bytes_per_output_token'] / MiB:.1f} MiB per token; any eviction moves at least "
            f"{bound['least_bytes_per_output_token'] / MiB:.1f} in its steps, at "
            f"{bound['link_bytes_per_second'] / 1e9:.2f} GB/s {limit}; "
            f"computing at the same time {bound['bound_with_compute_tokens_per_second']:.1f}, afterwards "
            f"{bound['one_after_the_other_tokens_per_second']:.1f}",
            highlight=False,
        )


def _cache_cells(point: dict[str, Any]) -> list[str]:
    if "hit_rate" not in point:
        return ["", "", ""]
    return [
        f"{point['hit_rate']['median']:.0%}",
        f"{point['fetched_bytes_per_output_token']['median'] / MiB:.1f}",
        f"{point['stall_share']['median']:.0%}",
    ]


def _print_offered(load: dict[str, Any], rates: dict[int, float], console: Console) -> None:
    done = ", ".join(
        f"{name} {point['requests_per_second']['median']:.2f}" for name, point in load["contenders"].items()
    )
    failed = {name: point["failed"]["max"] for name, point in load["contenders"].items() if point["failed"]["max"]}
    console.print(
        f"{load['concurrency']} at once: {rates[load['concurrency']]:.2f} requests/s offered; answered: {done}"
        + (f"; FAILED, at most: {failed}" if failed else ""),
        highlight=False,
        markup=False,
    )


def _print_ratios(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Of a baseline, round by round", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("N", "", "of", "tok/s", "min .. max", "TTFT 50", "TPOT 99", "min .. max"):
        table.add_column(column, justify="left" if column in ("", "of") else "right", no_wrap=True)
    for load in result["loads"]:
        for name, point in load["contenders"].items():
            for base, ratio in point["ratios"].items():
                if name == "on_demand_lru" and base == "vllm_order":  # the inverse ratio is shown
                    continue
                speed, slowest = ratio["output_tokens_per_second"], ratio["tpot_p99_ms"]
                table.add_row(
                    str(load["concurrency"]),
                    SHORT[name],
                    SHORT[base],
                    f"{speed['median']:.2f}",
                    f"{speed['min']:.2f} .. {speed['max']:.2f}",
                    f"{ratio['ttft_p50_ms']['median']:.2f}",
                    f"{slowest['median']:.2f}",
                    f"{slowest['min']:.2f} .. {slowest['max']:.2f}",
                )
    if table.row_count:
        console.print(table)


def plot_serve(result: dict[str, Any], path: Path) -> None:
    """Plots throughput, TTFT and TPOT against concurrency, one line per contender."""
    panels = {"output_tokens_per_second": "tokens/s", "ttft_p99_ms": "TTFT p99, ms", "tpot_p99_ms": "TPOT p99, ms"}
    with figure(path, "requests at once", "", columns=len(panels)) as axes:
        for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
            axis.set_ylabel(label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_minor_formatter("{x:.0f}")
            numbers = [load["concurrency"] for load in result["loads"]]
            axis.set_xticks(numbers, [str(number) for number in numbers])
            for name in result["configurations"]:
                values = [load["contenders"][name][key] for load in result["loads"]]
                middle = [value["median"] for value in values]
                spans = [[m - v["min"] for m, v in zip(middle, values, strict=True)],
                         [v["max"] - m for m, v in zip(middle, values, strict=True)]]  # fmt: skip
                axis.errorbar(numbers, middle, yerr=spans, marker="o", markersize=3, capsize=2, label=name)
        axes[0][0].legend(frameon=False, fontsize=8)
