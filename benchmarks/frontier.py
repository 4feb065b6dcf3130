"""Measures loss against bytes fetched, decoding the same held-out tokens under every gating rule."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.residency import FRACTIONS, ON_DEMAND
from vllm_adapmoe.calibrate.evaluate import relative_increase
from vllm_adapmoe.calibrate.text import data_hash, read_sequences
from vllm_adapmoe.profile.model_profile import ModelProfile

BATCHES = {1: 8, 8: 32, 32: 64}
"""Batch sizes, and the number of requests decoded with each."""
PROMPT_TOKENS = 8
TOKEN_DROPS = (0.1, 0.25, 0.4, 0.6)
"""Points of rule `token`, as shares of the top_k - 1 experts that a token can lose."""
BATCH_FACTORS = (0.5, 1, 2, 4, 8, 16)
"""Thresholds of rule `batch`, relative to the `token` threshold at the second share in `TOKEN_DROPS`."""


def plans(profile: ModelProfile) -> list[dict[str, Any] | None]:
    """Returns the gating plans to compare; None: no gating."""
    top_k = profile.model.top_k
    sensitivity = [layer.sensitivity for layer in profile.layers]
    thresholds = [profile.threshold_for_experts(top_k - share * (top_k - 1)) for share in TOKEN_DROPS]
    rules: list[dict[str, Any]] = [{"rule": "token", "threshold": threshold} for threshold in thresholds]
    rules += [{"rule": "batch", "threshold": thresholds[1] * factor} for factor in BATCH_FACTORS]
    rules += [{"rule": "weight", "threshold": (top_k - 1) / top_k * step / 7} for step in (3, 4, 5)]
    rules += [{"rule": "count", "experts": top_k - share * (top_k - 1)} for share in (0.25, 0.5, 1)]
    return [None, *(rule | {"sensitivity": sensitivity} for rule in rules)]


def run_frontier(model: Path, profile_path: Path, data: Path, sequence_length: int) -> dict[str, Any]:
    """Forces held-out tokens through decode steps at three residencies and three batch sizes.

    Every point decodes the same tokens, so differences in loss come from the rule; the cache is warm from the previous
    point. Losses are those that the engine reports for the forced tokens.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_adapmoe.integration.measure.engine import Engine, load_profile
    from vllm_adapmoe.integration.measure.losses import decode_losses

    profile = load_profile(profile_path, model)
    sequences = read_sequences(model, data, sequence_length, max(BATCHES.values()), seed=0)
    compared = plans(profile)
    points = []
    with tqdm(desc="Decoding", total=len(FRACTIONS) * len(BATCHES) * len(compared), unit="point") as bar:
        for fraction in FRACTIONS:
            with Engine(
                model,
                ON_DEMAND | {"cache_fraction": fraction, "store": "host"},
                enforce_eager=True,
                max_model_len=sequence_length + 1,
                max_num_seqs=max(BATCHES),
                forced=True,
            ) as engine:
                for batch, count in BATCHES.items():
                    chosen = sequences[: min(count, len(sequences))]
                    base: np.ndarray | None = None
                    for plan in compared:
                        engine.call("set_gating", plan)
                        before = engine.cache_stats()["fetched_bytes"]
                        nats = np.concatenate(
                            [
                                decode_losses(engine, chosen[start : start + batch], PROMPT_TOKENS).nats
                                for start in range(0, len(chosen), batch)
                            ]
                        ).reshape(len(chosen), -1)
                        base = nats if base is None else base
                        tokens = len(chosen) * sequence_length
                        stats = engine.cache_stats()
                        increase, error = relative_increase(nats, base)
                        predicted = 0.0 if plan is None else profile.loss_scale * stats["loss_spent"] / tokens
                        points.append(
                            {"resident": fraction, "batch": batch}
                            | _rule(plan, profile, stats)
                            | {
                                "bytes_per_token": (stats["fetched_bytes"] - before) / tokens,
                                "loss_increase": increase,
                                "loss_increase_stderr": error,
                                "predicted_loss_increase": predicted / float(base.mean()),
                            }
                        )
                        bar.update()
    return {
        "benchmark": "frontier",
        "model": str(model),
        "profile": str(profile_path),
        "data": {"path": str(data), "hash": data_hash(sequences)},
        "sequence_length": sequence_length,
        "points": points,
    }


def _rule(plan: dict[str, Any] | None, profile: ModelProfile, stats: dict[str, float]) -> dict[str, Any]:
    """Returns a rule, its threshold and how many experts it keeps."""
    if plan is None:
        return {"rule": "off", "threshold": None, "mean_experts": profile.model.top_k}
    return {
        "rule": plan["rule"],
        "threshold": plan.get("threshold"),
        "mean_experts": stats["kept_experts"] / stats["gated_tokens"],
    }


LABELS = {"off": "off", "token": "token", "batch": "batch", "weight": "weight", "count": "fixed k"}


def print_frontier(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Decoding held-out text, {result['model']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("resident", "batch", "rule", "T", "kept", "MiB/token", "loss", "±", "predicted"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        table.add_row(
            f"{point['resident']:.0%}",
            str(point["batch"]),
            LABELS[point["rule"]],
            "" if point["threshold"] is None else f"{point['threshold']:.2g}",
            f"{point['mean_experts']:.2f}",
            f"{point['bytes_per_token'] / 2**20:.3f}",
            f"{point['loss_increase']:+.2%}",
            f"{point['loss_increase_stderr']:.2%}",
            f"{point['predicted_loss_increase']:+.2%}",
        )
    console.print(table)


def plot_frontier(result: dict[str, Any], path: Path) -> None:
    """Plots measured loss increase against bytes fetched, one panel for each residency and batch size."""
    from vllm_adapmoe.plot import figure

    share = "bytes fetched, relative to no gating"
    with figure(path, share, "loss increase, %", columns=len(BATCHES), rows=len(FRACTIONS)) as axes:
        for row, fraction in zip(axes, FRACTIONS, strict=True):
            for panel, batch in zip(row, BATCHES, strict=True):
                points = [p for p in result["points"] if (p["resident"], p["batch"]) == (fraction, batch)]
                ungated = next(p["bytes_per_token"] for p in points if p["rule"] == "off")
                for rule, label in LABELS.items():
                    line = sorted((p for p in points if p["rule"] == rule), key=lambda p: p["bytes_per_token"])
                    panel.errorbar(
                        [p["bytes_per_token"] / ungated for p in line],
                        [100 * p["loss_increase"] for p in line],
                        [100 * p["loss_increase_stderr"] for p in line],
                        marker="o", markersize=3, linewidth=1, capsize=2, label=label,
                    )  # fmt: skip
                panel.set_title(f"{fraction:.0%} resident, batch {batch}", fontsize=9)
                panel.set_ylim(-0.5, 4)
        axes[0][0].legend(frameon=False, fontsize=8)
