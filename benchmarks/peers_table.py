"""Prints the result of `python -m benchmarks peers`."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.units import GiB, MiB


def print_peers(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table, and the lower bound of the time per token."""
    memory = result["memory_bytes"]
    limit = "no memory limit" if memory is None else f"{memory / GiB:.2f} GiB for everything"
    size = result["experts"] * result["expert_bytes"]
    table = Table(
        title=f"Batch 1, {limit}, experts of {size / GiB:.2f} GiB, {result['model']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "tok/s", "min .. max", "ms", "of peer", "prefill", "GiB", "MiB", "agrees"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, point in result["contenders"].items():
        table.add_row(name, *([point["failure"]] if "failure" in point else _cells(point)))
    console.print(table)
    for name, point in result["contenders"].items():
        if "failure" in point:
            console.print(f"{name}: {_failure(point)}", highlight=False, markup=False)
    settings = {name: point["settings"] for name, point in result["contenders"].items() if point["settings"]}
    slots = settings.get("adapmoe", {}).get("slots")
    console.print(
        f"of peer: tokens/s over the best peer's; prefill: seconds; GiB: peak memory without page cache; MiB: read "
        f"from disk per token; agrees: same most probable tokens; adapmoe has {slots} slots for {result['experts']} "
        f"experts",
        highlight=False,
    )
    if result["floor"] is not None and "times_floor" in result["floor"]:
        _print_floor(result["floor"], console)


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
        f"floor: {floor['ms_per_token']['median']:.0f} ms per token, "
        f"{floor['belady_bytes_per_token']['median'] / MiB:.0f} MiB that Belady's cache would move at "
        f"{floor['sequential_bytes_per_second']['median'] / 1e9:.2f} GB/s and "
        f"{floor['compute_ms_per_token']['median']:.0f} ms of computing, one after "
        f"the other ({floor['overlapped_ms_per_token']['median']:.0f} ms at once); times that: {times}",
        highlight=False,
    )
