"""Measures what gating saves in decode time, kernel time and bytes; gating off and on, interleaved on one engine."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.residency import FRACTIONS, ON_DEMAND
from benchmarks.workload import measure, prompts_of, ratios
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.results import spread

DROPS = (0.1, 0.25, 0.5, 1.0)
"""Gating points, as shares of the top_k - 1 experts that a token can lose; at 1 every token keeps one expert."""


def run_gating(
    model: Path,
    profile_path: Path,
    text: Path | None,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
    batch: int,
    store: str,
) -> dict[str, Any]:
    """Decodes without gating and with each threshold in turn, on one engine per residency.

    Kernel time is the time in expert kernels, without fetches. On a GPU it would be only the time to launch them, so it
    is meaningful on the CPU only.
    """
    from vllm_adapmoe.integration.measure.engine import Engine, describe_model

    profile = ModelProfile.load(profile_path)
    profile.check(describe_model(model), str(profile_path))
    top_k = profile.model.top_k
    sensitivity = [layer.sensitivity for layer in profile.layers]
    settings: dict[str, dict[str, Any] | None] = {"off": None}
    for share in DROPS:
        threshold = profile.threshold_for_experts(top_k - share * (top_k - 1)) if share < 1 else 1e9
        settings[f"{share:.0%}"] = {"rule": "token", "threshold": threshold, "sensitivity": sensitivity}
    prompts = prompts_of(model, text, batch, prompt_tokens)
    points = []
    for fraction in (*FRACTIONS, 1.0):
        config = ON_DEMAND | {"cache_fraction": fraction, "store": store}
        if fraction == 1.0:  # gated from the start, else the layers run vLLM's own code
            config |= {"profile": str(profile_path), "gating": {"mode": "token", "threshold": 0.0}}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
        with Engine(model, config, max_model_len=prompt_tokens + output_tokens) as engine:
            engine.call("time_parts")
            names = list(settings)
            for number in range(-1, rounds):  # the first round warms up
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    engine.call("set_gating", settings[name])
                    before = engine.call("part_seconds")["kernels"]
                    result = measure(engine, prompts, output_tokens)
                    result["kernel_seconds"] = engine.call("part_seconds")["kernels"] - before
                    kept = engine.call("kept_by_layer")
                    result["mean_experts"] = sum(kept) / len(kept) if kept else float(top_k)
                    if number >= 0:
                        measured[name].append(result)
        tokens = batch * (prompt_tokens + output_tokens)
        points += [
            {"resident": fraction, "dropping": name} | _point(measured[name], measured["off"], tokens) for name in names
        ]
    return {
        "benchmark": "gating",
        "model": str(model),
        "profile": str(profile_path),
        "store": store,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "points": points,
    }


def _point(rounds: list[dict[str, Any]], off: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {
        "mean_experts": spread([one["mean_experts"] for one in rounds]),
        "decode_ratio": ratios(rounds, off, "decode_tokens_per_second"),
        "decode_tokens_per_second": spread([one["decode_tokens_per_second"] for one in rounds]),
        "kernel_ratio": ratios(rounds, off, "kernel_seconds"),
        "kernel_seconds_per_token": spread([one["kernel_seconds"] / tokens for one in rounds]),
        "fetched_bytes_per_token": spread([one["cache"].get("fetched_bytes", 0) / tokens for one in rounds]),
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
