"""Prints and plots the result of `python -m benchmarks peers`."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.plot import figure
from vllm_adapmoe.units import GiB, MiB


def print_peers(result: dict[str, Any], console: Console) -> None:
    """Prints a table for each memory limit with its lower bound of the time per token, and one of losses."""
    for limit in result["limits"]:
        _print_limit(result, limit, console)
    console.print(
        "of peer: tokens/s over the best peer's; prefill: seconds; GiB: peak memory without page cache; MiB: read "
        "from disk per token; agrees: same most probable tokens",
        highlight=False,
    )
    if result["losses"]:
        _print_losses(result, console)


def _print_limit(result: dict[str, Any], limit: dict[str, Any], console: Console) -> None:
    memory = limit["memory_bytes"]
    allowed = "no memory limit" if memory is None else f"{memory / GiB:.2f} GiB for everything"
    size = result["experts"] * result["expert_bytes"]
    table = Table(
        title=f"Batch 1, {allowed}, {result['experts']} experts of {size / GiB:.2f} GiB, {result['model']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "slots", "tok/s", "min .. max", "ms", "of peer", "prefill", "GiB", "MiB", "agrees"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    failed = {name: point for name, point in limit["contenders"].items() if "failure" in point}
    for name, point in limit["contenders"].items():
        slots = str(point["settings"].get("slots", ""))
        table.add_row(name, slots, *([""] if name in failed else _cells(point)))
    console.print(table)
    for name, point in failed.items():
        console.print(f"{name}: {_failure(point)}", highlight=False, markup=False)
    for peer, pair in limit["rivals"].items():
        ratio = pair["ratio"]
        console.print(
            f"{pair['fastest']}, at no more loss, over {peer}: {ratio['median']:.2f} ({ratio['min']:.2f} .. "
            f"{ratio['max']:.2f})",
            highlight=False,
        )
    if limit["floor"] is not None:
        _print_floor(limit["floor"], console)


def _cells(point: dict[str, Any]) -> list[str]:
    speed, ratio = point["decode_tokens_per_second"], point["ratio_to_best_peer"]
    return [
        f"{speed['median']:.2f}",
        f"{speed['min']:.2f} .. {speed['max']:.2f}",
        f"{point['decode_ms_per_token']['median']:.0f}",
        "" if ratio is None else f"{ratio['median']:.2f}",
        f"{point['prefill_seconds']['median']:.1f}",
        f"{point['held_bytes'] / GiB:.2f}",
        f"{point['read_bytes_per_token']['median'] / MiB:.0f}",
        "" if point["agreement"] is None else f"{point['agreement']:.1%}",
    ]


def _failure(point: dict[str, Any]) -> str:
    code = point.get("exit_code")
    return point["failure"] + ("" if code is None else f" (exit code {code})")


def _print_floor(floor: dict[str, Any], console: Console) -> None:
    times = ", ".join(f"{name} {spread['median']:.2f}" for name, spread in floor["times_floor"].items())
    console.print(
        f"floor in 16 bits: {floor['ms_per_token']['median']:.0f} ms per token, "
        f"{floor['belady_bytes_per_token']['median'] / MiB:.0f} MiB that Belady's cache would move at "
        f"{floor['sequential_bytes_per_second']['median'] / 1e9:.2f} GB/s and "
        f"{floor['compute_ms_per_token']['median']:.0f} ms of computing, one after "
        f"the other ({floor['overlapped_ms_per_token']['median']:.0f} ms at once); times that: {times}",
        highlight=False,
    )


def _print_losses(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Loss of {result['loss_tokens']} tokens", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "file, GiB", "nats per token", "increase"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, point in result["losses"].items():
        table.add_row(name, f"{result['file_bytes'][name] / GiB:.2f}", f"{point['nats']:.4f}", _increase(point))
    console.print(table)


def _increase(point: dict[str, float]) -> str:
    return f"{point['increase']:+.2%} ± {point['increase_error']:.2%}" if "increase" in point else ""


def plot_peers(result: dict[str, Any], path: Path) -> None:
    """Plots tokens per second by memory limit, a line for each contender, with its loss in the legend."""
    with figure(path, "memory for everything, GiB", "tokens per second") as axes:
        for name in result["limits"][0]["contenders"]:
            points = [
                ((limit["memory_bytes"] or 0) / GiB, limit["contenders"][name]["decode_tokens_per_second"]["median"])
                for limit in result["limits"]
                if "failure" not in limit["contenders"][name]
            ]
            if not points:
                continue
            loss = result["losses"].get(name, {}).get("increase")
            ours = name.startswith("adapmoe")
            label = name if loss is None else f"{name} ({loss:+.2%} loss)"
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="-" if ours else "--", label=label)
        axes.set_yscale("log")
        axes.legend(fontsize=7)
