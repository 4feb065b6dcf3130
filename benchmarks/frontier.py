"""Measures loss against bytes fetched, decoding the same held-out tokens under every gating rule and precision."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.residency import FRACTIONS, ON_DEMAND, budget_of
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
FEWER_PLANS = (0, 1, 4, 6, 7, 8)
"""Plans that are run for several precisions: of `token` the first two, of `batch` the thresholds 0.5, 2, 4 and 8."""
LOSS_LIMIT = 0.005
"""Relative loss increase at which bytes are compared."""


def plans(profile: ModelProfile, all_rules: bool = True) -> list[dict[str, Any] | None]:
    """Returns the gating plans to compare; None: no gating. With `all_rules` unset, those of `FEWER_PLANS`."""
    top_k = profile.model.top_k
    sensitivity = [layer.sensitivity for layer in profile.layers]
    thresholds = [profile.threshold_for_experts(top_k - share * (top_k - 1)) for share in TOKEN_DROPS]
    rules: list[dict[str, Any]] = [{"rule": "token", "threshold": threshold} for threshold in thresholds]
    rules += [{"rule": "batch", "threshold": thresholds[1] * factor} for factor in BATCH_FACTORS]
    if all_rules:
        rules += [{"rule": "weight", "threshold": (top_k - 1) / top_k * step / 7} for step in (3, 4, 5)]
        rules += [{"rule": "count", "experts": top_k - share * (top_k - 1)} for share in (0.25, 0.5, 1)]
    else:
        rules = [rules[place] for place in FEWER_PLANS]
    return [None, *(rule | {"sensitivity": sensitivity} for rule in rules)]


def run_frontier(
    model: Path, profile_path: Path, data: Path, sequence_length: int, precisions: Sequence[int] = ()
) -> dict[str, Any]:
    """Forces held-out tokens through decode steps at three residencies and three batch sizes.

    Every point decodes the same tokens, so differences in loss come from the rule and the precision; the cache is warm
    from the previous point. Losses are those that the engine reports for the forced tokens.

    Args:
        model: checkpoint folder.
        profile_path: its profile.
        data: held-out text.
        sequence_length: tokens per sequence.
        precisions: values of the key `precision` to compare with 16, at slots of as many bytes, with fewer plans.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_adapmoe.integration.measure.engine import Engine, count_experts, load_profile
    from vllm_adapmoe.integration.measure.losses import decode_losses

    profile = load_profile(profile_path, model)
    sequences = read_sequences(model, data, sequence_length, max(BATCHES.values()), seed=0)
    compared = plans(profile, all_rules=not precisions)
    points = []
    total = len(FRACTIONS) * len(BATCHES) * len(compared) * (1 + len(precisions))
    bases: dict[int, np.ndarray] = {}
    with tqdm(desc="Decoding", total=total, unit="point") as bar:
        for fraction in FRACTIONS:
            budget: dict[str, Any] = {"cache_fraction": fraction}
            for precision in (16, *precisions):
                with Engine(
                    model,
                    ON_DEMAND | budget | {"store": "host", "precision": precision},
                    enforce_eager=True,
                    max_model_len=sequence_length + 1,
                    max_num_seqs=max(BATCHES),
                    forced=True,
                ) as engine:
                    if precision == 16:
                        budget = budget_of(fraction, count_experts(model), engine.call("largest_expert_bytes"))
                    # Where every expert is resident, gating saves no bytes.
                    rules = compared if engine.cache_stats() else compared[:1]
                    bar.update(len(BATCHES) * (len(compared) - len(rules)))
                    decode_losses(engine, sequences[: max(BATCHES)], PROMPT_TOKENS)  # fills the slots
                    for batch, count in BATCHES.items():
                        chosen = sequences[: min(count, len(sequences))]
                        for plan in rules:
                            engine.call("set_gating", plan)
                            before = engine.cache_stats().get("fetched_bytes", 0)
                            nats = np.concatenate(
                                [
                                    decode_losses(engine, chosen[start : start + batch], PROMPT_TOKENS).nats
                                    for start in range(0, len(chosen), batch)
                                ]
                            ).reshape(len(chosen), -1)
                            if plan is None and precision == 16:
                                bases[batch] = nats
                            tokens = len(chosen) * sequence_length
                            stats = engine.cache_stats()
                            increase, error = relative_increase(nats, bases[batch])
                            points.append(
                                {"resident": fraction, "batch": batch, "precision": precision}
                                | _rule(plan, profile, stats)
                                | {
                                    "bytes_per_token": (stats.get("fetched_bytes", 0) - before) / tokens,
                                    "loss_increase": increase,
                                    "loss_increase_stderr": error,
                                    "predicted_loss_increase": _predicted(plan, precision, profile, stats, tokens),
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
        "least_bytes": [
            {"resident": fraction, "batch": batch, "shares": least_bytes(points_of(points, fraction, batch))}
            for fraction in FRACTIONS
            for batch in BATCHES
        ],
    }


def _predicted(
    plan: dict[str, Any] | None, precision: int, profile: ModelProfile, stats: dict[str, float], tokens: int
) -> float | None:
    """Returns the loss increase that the profile predicts, relative; None if it does not say what a precision costs."""
    rounding = profile.rounding_loss(precision)
    if rounding is None or profile.base_loss is None:
        return None
    gating = 0.0 if plan is None else profile.loss_scale * stats["loss_spent"] / tokens
    return (rounding + gating) / profile.base_loss


def points_of(points: list[dict[str, Any]], fraction: float, batch: int) -> list[dict[str, Any]]:
    """Returns the points of one residency and batch size."""
    return [point for point in points if (point["resident"], point["batch"]) == (fraction, batch)]


def least_bytes(points: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the least bytes fetched at a loss increase of `LOSS_LIMIT`, as a share of those at 16 bits, ungated.

    On the line through the points of a rule at a precision, from its ungated point.

    Returns:
        `gating`: each rule at 16 bits, by name; `precision`: ungated, any precision; `together`: any rule, any
        precision. None: no point is within the limit, or nothing is fetched at 16 bits either.
    """
    ungated = {point["precision"]: point for point in points if point["rule"] == "off"}
    whole = ungated[16]["bytes_per_token"]
    every = [_crossing([point]) for point in ungated.values()]
    shares = {"precision": _least(every, whole)}
    for rule in LABELS:
        for precision, start in ungated.items():
            line = [point for point in points if (point["rule"], point["precision"]) == (rule, precision)]
            if rule == "off" or not line:
                continue
            crossing = _crossing([start, *line])
            every.append(crossing)
            if precision == 16:
                shares[rule] = _least([crossing], whole)
    shares["together"] = _least(every, whole)
    return shares


def _crossing(line: list[dict[str, Any]]) -> float | None:
    """Returns the least bytes on a line of points, in order of their bytes, whose loss is within `LOSS_LIMIT`.

    That is of the last point within, or between it and the next one, which is beyond. None: no point is within.
    """
    ordered = sorted(line, key=lambda point: -point["bytes_per_token"])
    places = [place for place, point in enumerate(ordered) if point["loss_increase"] <= LOSS_LIMIT]
    if not places:
        return None
    ends = ordered[places[-1] : places[-1] + 2]
    losses = [point["loss_increase"] for point in ends]
    return float(np.interp(LOSS_LIMIT, losses, [point["bytes_per_token"] for point in ends]))


def _least(values: list[float | None], whole: float) -> float | None:
    if not whole:
        return None
    return min((value / whole for value in values if value is not None), default=None)


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
    """Prints the points, and the least bytes at `LOSS_LIMIT`."""
    table = Table(title=f"Decoding held-out text, {result['model']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("resident", "batch", "bits", "rule", "T", "kept", "MiB/token", "loss", "±", "predicted"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        predicted = point["predicted_loss_increase"]
        table.add_row(
            f"{point['resident']:.0%}",
            str(point["batch"]),
            str(point["precision"]),
            LABELS[point["rule"]],
            "" if point["threshold"] is None else f"{point['threshold']:.2g}",
            f"{point['mean_experts']:.2f}",
            f"{point['bytes_per_token'] / 2**20:.3f}",
            f"{point['loss_increase']:+.2%}",
            f"{point['loss_increase_stderr']:.2%}",
            "" if predicted is None else f"{predicted:+.2%}",
        )
    console.print(table)
    names = list(result["least_bytes"][0]["shares"])
    table = Table(
        title=f"Least bytes fetched at {LOSS_LIMIT:.1%} more loss, of those at 16 bits without gating",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("resident", "requests", *(LABELS.get(name, name) for name in names)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["least_bytes"]:
        shares = ["" if share is None else f"{share:.2f}" for share in row["shares"].values()]
        table.add_row(f"{row['resident']:.0%}", str(row["batch"]), *shares)
    console.print(table)


LINES = {16: "-", 8: "--", 4: ":"}


def plot_frontier(result: dict[str, Any], path: Path) -> None:
    """Plots measured loss increase against bytes fetched, one panel for each residency and batch size."""
    from vllm_adapmoe.plot import figure

    share = "bytes fetched, relative to 16 bits without gating"
    precisions = dict.fromkeys(point["precision"] for point in result["points"])
    with figure(path, share, "loss increase, %", columns=len(BATCHES), rows=len(FRACTIONS)) as axes:
        for row, fraction in zip(axes, FRACTIONS, strict=True):
            for panel, batch in zip(row, BATCHES, strict=True):
                points = points_of(result["points"], fraction, batch)
                ungated = next(p["bytes_per_token"] for p in points if (p["rule"], p["precision"]) == ("off", 16))
                for number, (rule, label) in enumerate(LABELS.items()):
                    for precision in precisions:
                        line = [p for p in points if (p["rule"], p["precision"]) == (rule, precision)]
                        line.sort(key=lambda p: p["bytes_per_token"])
                        if not line:
                            continue
                        panel.errorbar(
                            [p["bytes_per_token"] / ungated for p in line],
                            [100 * p["loss_increase"] for p in line],
                            [100 * p["loss_increase_stderr"] for p in line],
                            marker="o", markersize=3, linewidth=1, capsize=2, color=f"C{number}",
                            linestyle=LINES[precision], mfc="white" if precision < 16 else None,
                            label=label if precision == 16 else f"{label}, {precision} bit",
                        )  # fmt: skip
                panel.axhline(100 * LOSS_LIMIT, color="grey", linewidth=0.5)
                panel.set_title(f"{fraction:.0%} of the bytes resident, batch {batch}", fontsize=9)
                panel.set_ylim(-1, 4)
        axes[0][0].legend(frameon=False, fontsize=7)
