"""Measures what gating saves in decode time, kernel time and bytes; gating off and on, interleaved on one engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.residency import FRACTIONS, ON_DEMAND
from benchmarks.workload import Workload, measure, ratios
from vllm_adapmoe.results import rotated, spread

DROPS = (0.1, 0.25, 0.5, 1.0)
"""Gating points, as shares of the top_k - 1 experts that a token can lose; at 1 every token keeps one expert."""


@dataclass(frozen=True, kw_only=True)
class GatingSpec(Workload):
    """Requests to measure gating on, and the cache that serves them."""

    profile: Path
    store: str
    """Backing store: host or file."""


def run_gating(spec: GatingSpec) -> dict[str, Any]:
    """Decodes without gating and with each threshold in turn, on one engine per residency.

    Kernel time is the time in expert kernels, without fetches. On a GPU it would be only the time to launch them, so it
    is meaningful on the CPU only.
    """
    from vllm_adapmoe.integration.measure.engine import Engine, load_profile

    profile = load_profile(spec.profile, spec.model)
    top_k = profile.model.top_k
    sensitivity = [layer.sensitivity for layer in profile.layers]
    settings: dict[str, dict[str, Any] | None] = {"off": None}
    for share in DROPS:
        threshold = profile.threshold_for_experts(top_k - share * (top_k - 1)) if share < 1 else 1e9
        settings[f"{share:.0%}"] = {"rule": "token", "threshold": threshold, "sensitivity": sensitivity}
    prompts = spec.prompts()
    points = []
    for fraction in (*FRACTIONS, 1.0):
        # Gated from the start, as a server is: gating is then compiled with the model.
        gated = {"profile": str(spec.profile), "gating": {"mode": "token", "threshold": 0.0}}
        config = ON_DEMAND | gated | {"cache_fraction": fraction, "store": spec.store}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
        with Engine(spec.model, config, max_model_len=spec.length) as engine:
            engine.call("time_parts")
            for number in range(-1, spec.rounds):  # the first round warms up
                for name in rotated(list(settings), number):
                    engine.call("set_gating", settings[name])
                    before = engine.call("part_seconds")["kernels"]
                    result = measure(engine, prompts, spec.output_tokens)
                    result["kernel_seconds"] = engine.call("part_seconds")["kernels"] - before
                    kept = engine.call("kept_by_layer")
                    result["mean_experts"] = sum(kept) / len(kept) if kept else float(top_k)
                    if number >= 0:
                        measured[name].append(result)
        points += [
            {"resident": fraction, "dropping": name} | _point(rounds, measured["off"], spec.batch * spec.length)
            for name, rounds in measured.items()
        ]
    return {
        "benchmark": "gating",
        **spec.described(),
        "profile": str(spec.profile),
        "store": spec.store,
        "points": points,
    }


def _point(rounds: list[dict[str, Any]], off: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {
        "mean_experts": spread([result["mean_experts"] for result in rounds]),
        "decode_ratio": ratios(rounds, off, "decode_tokens_per_second"),
        "decode_tokens_per_second": spread([result["decode_tokens_per_second"] for result in rounds]),
        "kernel_ratio": ratios(rounds, off, "kernel_seconds"),
        "kernel_seconds_per_token": spread([result["kernel_seconds"] / tokens for result in rounds]),
        "fetched_bytes_per_token": spread([result["cache"].get("fetched_bytes", 0) / tokens for result in rounds]),
    }


def print_gating(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(
        title=f"Gating by token against none, batch {result['batch']}, {result['model']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("resident", "dropping", "kept", "decode", "min .. max", "kernel", "min .. max", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        decode, kernel = point["decode_ratio"], point["kernel_ratio"]
        table.add_row(
            f"{point['resident']:.0%}",
            point["dropping"],
            f"{point['mean_experts']['median']:.2f}",
            f"{decode['median']:.2f}",
            f"{decode['min']:.2f} .. {decode['max']:.2f}",
            f"{kernel['median']:.2f}",
            f"{kernel['min']:.2f} .. {kernel['max']:.2f}",
            f"{point['fetched_bytes_per_token']['median'] / 2**20:.2f}",
        )
    console.print(table)
