"""Tabulates the model of decode costs (`vllm_adapmoe.planning.decode_cost`): computed, nothing is measured."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.decode_shapes import GPUS, H200, MODELS, QWEN3
from vllm_adapmoe.planning.decode_cost import (
    PREDICTING_KERNELS,
    PREFETCH_KERNELS,
    DecodeModel,
    GpuSpeed,
    break_even_bandwidth,
    decided_on_device,
    decided_on_host,
    device_faster_from,
    layer_costs,
    llama_cpp,
    misses_on_host,
    overtaking_hit_rate,
    stock_seconds,
    uva,
)
from vllm_adapmoe.planning.memory_plan import UTILIZATION, Reserve
from vllm_adapmoe.planning.token_time import DECIDING_KERNELS, HOST_LAYER_SECONDS
from vllm_adapmoe.units import GiB

HIT_RATES = (0.0, 0.5, 0.75, 0.9, 0.95, 1.0)
LAYER_HIT_RATE, HALF = 0.75, 0.5
"""Hit rate of the table of launches, and the resident share that every model is compared at."""
RESERVE = Reserve(2 * GiB, 1 - UTILIZATION)
"""Device memory for neither weights nor experts: vLLM's unused share; 2 GiB for context, activations, graphs and KV
cache are assumed, as in the example of docs/planning.md."""
SLOW_HOST_SECONDS = 7e-4
"""A slower host's time in a MoE layer, assumed; the H200's took 0.3 ms half resident, and 0.5 ms at 75 %."""
WAYS = {
    "device": "device decides",
    "device_prefetch": "device, prefetch at best",
    "host": "host decides, 0.3 ms a layer",
    "slow_host": "host decides, 0.7 ms a layer",
}
LAYER_WAYS = {
    "stock": "stock vLLM", "device": "device", "device_prefetch": "device, prefetch", "host": "host",
    "uva": "UVA", "llama_cpp": "llama.cpp",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A decode of the 48 MoE layers of Qwen3-30B-A3B on an H200 (examples/benchmarks/gpu/device.json), per token."""

    what: str
    misses: float
    """Experts that were not resident."""
    seconds: float
    caught_up: float = 0.0
    """Experts that were loaded after the step, in place."""


MEASURED = (
    Measured("all resident, in a graph", 0, 0.00145386),
    Measured("50 %, host decides", 198.65, 0.0485475),
    Measured("75 %, host decides", 97.25, 0.0400133),
    Measured("50 %, in place", 201.6, 0.0557573, 15.15),
    Measured("75 %, in place", 99.75, 0.0369616, 15.7),
)


@dataclass(frozen=True)
class DecodeCostSpec:
    """What to tabulate."""

    host_gbps: Sequence[float] = (60.0, 200.0)
    """Bandwidths of host memory, 1e9 bytes per second."""


def run_decode_cost(spec: DecodeCostSpec) -> dict[str, Any]:
    """Computes all tables."""
    return {
        "benchmark": "decode_cost",
        "basis": "computed by vllm_adapmoe.planning.decode_cost; nothing was measured but the rows of `measured`",
        "assumed": {
            "host_layer_seconds": {"host": HOST_LAYER_SECONDS, "slow_host": SLOW_HOST_SECONDS},
            "deciding_kernels": DECIDING_KERNELS,
            "predicting_kernels": PREDICTING_KERNELS,
            "prefetch_kernels": PREFETCH_KERNELS,
            "reserve": asdict(RESERVE),
        },
        "models": [asdict(model) for model in MODELS],
        "gpus": [asdict(gpu) | {"memory": memory} for gpu, memory in GPUS.items()],
        "layers": [_layers(model) for model in MODELS],
        "points": [_point(model, gpu, memory, spec) for gpu, memory in GPUS.items() for model in MODELS],
        "measured": [_compared(measured) for measured in MEASURED],
    }


def _layers(model: DecodeModel) -> dict[str, Any]:
    costs = layer_costs(model, LAYER_HIT_RATE, HALF)
    return {"model": model.name, "hit_rate": LAYER_HIT_RATE, "resident": HALF} | {
        "ways": {name: asdict(cost) for name, cost in costs.items()}
    }


def _point(model: DecodeModel, gpu: GpuSpeed, memory: int, spec: DecodeCostSpec) -> dict[str, Any]:
    times = {
        "device": [decided_on_device(model, gpu, rate) for rate in HIT_RATES],
        "device_prefetch": [decided_on_device(model, gpu, rate, prefetch=True) for rate in HIT_RATES],
        "host": [decided_on_host(model, gpu, rate) for rate in HIT_RATES],
        "slow_host": [decided_on_host(model, gpu, rate, SLOW_HOST_SECONDS) for rate in HIT_RATES],
    }
    times |= {
        f"misses_{gbps:g}": [misses_on_host(model, gpu, rate, gbps * 1e9) for rate in HIT_RATES]
        for gbps in spec.host_gbps
    }
    fits = max(0, RESERVE.slots(model.size, memory)) / model.size.experts
    offloaded = []
    for resident in sorted({HALF, fits} - {1.0}):
        others = {"uva": uva(model, gpu, resident)}
        others |= {f"llama_cpp_{gbps:g}": llama_cpp(model, gpu, resident, gbps * 1e9) for gbps in spec.host_gbps}
        offloaded.append(
            {
                "resident": resident,
                "ms": {name: seconds * 1e3 for name, seconds in others.items()},
                "overtaken_at": {name: overtaking_hit_rate(model, gpu, seconds) for name, seconds in others.items()},
            }
        )
    bandwidths = [break_even_bandwidth(model, gpu, rate) for rate in HIT_RATES]
    return {
        "model": model.name,
        "gpu": gpu.name,
        "fits": fits,
        "stock_ms": stock_seconds(model, gpu) * 1e3,
        "hit_rates": HIT_RATES,
        "ms": {name: [seconds * 1e3 for seconds in row] for name, row in times.items()},
        "offloaded": offloaded,
        "device_faster_from": device_faster_from(model, gpu),
        "break_even_gbps": [None if math.isinf(bandwidth) else bandwidth / 1e9 for bandwidth in bandwidths],
    }


def _compared(measured: Measured) -> dict[str, Any]:
    """Computes a measured decode: MoE layers alone, of three kernels, without attention and output matrix."""
    whole = QWEN3.model()
    model = replace(whole, size=replace(whole.size, read_bytes=0), layer_kernels=3)
    hit_rate = 1 - measured.misses * model.size.expert_bytes / model.expert_bytes
    if not measured.misses:
        seconds = stock_seconds(model, H200)
    elif measured.caught_up:
        seconds = uva(model, H200, hit_rate) + measured.caught_up * model.size.expert_bytes / H200.link
    else:
        seconds = decided_on_host(model, H200, hit_rate)
    return asdict(measured) | {"computed_seconds": seconds, "ratio": seconds / measured.seconds}


def print_decode_cost(result: dict[str, Any], console: Console) -> None:
    """Prints the result as tables."""
    _print_layers(result["layers"], console)
    for gpu in result["gpus"]:
        points = [point for point in result["points"] if point["gpu"] == gpu["name"]]
        _print_times(gpu, points, console)
        _print_offloaded(gpu, points, console)
        _print_break_even(gpu, points, console)
    table = _table("Computed, and measured on an H200 (docs/gpu.md), ms", "48 MoE layers, Qwen3-30B-A3B bf16")
    for column in ("measured", "computed", "ratio"):
        table.add_column(column, justify="right")
    for row in result["measured"]:
        seconds, computed = row["seconds"] * 1e3, row["computed_seconds"] * 1e3
        table.add_row(row["what"], f"{seconds:.2f}", f"{computed:.2f}", f"{row['ratio']:.2f}")
    console.print(table)
    console.print("All times but those of the column `measured` are computed: no run has shown them.")


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


def _print_layers(layers: list[dict[str, Any]], console: Console) -> None:
    rates = f"hit rate {LAYER_HIT_RATE:g}; UVA, llama.cpp: {HALF:.0%} resident"
    table = _table(f"One MoE layer, one token, MB; {rates}", "")
    for column in ("kernels", "copies", "syncs", "read", "written", "link", "host"):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(layer["model"], style="bold")
        for way, name in LAYER_WAYS.items():
            cost = layer["ways"][way]
            kernels = f"{cost['kernels']}+{cost['side_kernels']}" if cost["side_kernels"] else str(cost["kernels"])
            nbytes = (cost[key] / 1e6 for key in ("device_read", "device_written", "link", "host_read"))
            table.add_row(
                f"  {name}", kernels, str(cost["copies"]), f"{cost['syncs']:g}", *(f"{size:.2f}" for size in nbytes)
            )
    console.print(table)
    console.print("read, written: device memory. host: weights that the host's cores read.")


def _print_times(gpu: dict[str, Any], points: list[dict[str, Any]], console: Console) -> None:
    table = _table(f"{gpu['name']}: ms per token by hit rate", "by")
    for rate in HIT_RATES:
        table.add_column(f"{rate:g}", justify="right")
    for point in points:
        table.add_row(f"{point['model']} (stock: {point['stock_ms']:.2f})", style="bold")
        for way, times in point["ms"].items():
            name = WAYS.get(way) or f"cores compute misses, {way.removeprefix('misses_')} GB/s"
            table.add_row(f"  {name}", *(f"{ms:.2f}" for ms in times))
    console.print(table)


def _print_offloaded(gpu: dict[str, Any], points: list[dict[str, Any]], console: Console) -> None:
    table = _table(f"{gpu['name']}: ms per token, and the hit rate at which the device is faster", "")
    names = {key: key.removeprefix("llama_cpp_") for key in points[0]["offloaded"][0]["ms"]} | {"uva": "UVA"}
    for column in ("fits", "resident", *names.values(), *(f"> {name}" for name in names.values())):
        table.add_column(column, justify="right")
    for point in points:
        for row in point["offloaded"]:
            rates = ("never" if rate is None else f"{rate:.3f}" for rate in row["overtaken_at"].values())
            table.add_row(
                point["model"], f"{point['fits']:.0%}", f"{row['resident']:.0%}",
                *(f"{ms:.2f}" for ms in row["ms"].values()), *rates,
            )  # fmt: skip
    console.print(table)
    console.print("numbers: llama.cpp, GB/s of host memory. fits: experts that fit beside the rest.")


def _print_break_even(gpu: dict[str, Any], points: list[dict[str, Any]], console: Console) -> None:
    table = _table(f"{gpu['name']}: GB/s of host memory from which its cores compute misses faster", "hit rate")
    for column in (*(f"{rate:g}" for rate in HIT_RATES[:-1]), "device over host from"):
        table.add_column(column, justify="right")
    for point in points:
        bandwidths = ("none" if gbps is None else f"{gbps:.1f}" for gbps in point["break_even_gbps"][:-1])
        table.add_row(point["model"], *bandwidths, f"{point['device_faster_from']:.2f}")
    console.print(table)
    console.print(
        f"last column: hit rate from which the device beats a host of {HOST_LAYER_SECONDS * 1e3:g} ms a layer"
    )
