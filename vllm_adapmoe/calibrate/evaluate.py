"""Measures the accuracy cost of gating on held-out text: by sensitivity, by weight alone, and a smaller fixed top-k."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.calibrate.text import data_hash, read_sequences
from vllm_adapmoe.profile.model_profile import ModelProfile

DROPS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Default thresholds, as shares of the top_k - 1 experts that a token can lose."""
GROUP = 32
"""Number of sequences in the engine at once."""
DECODE_SEQUENCES, DECODE_PROMPT = 16, 8


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What to evaluate: a model with its profile, and the text to do it on."""

    model: Path
    """Checkpoint folder."""
    profile: Path
    data: Path
    """Held-out text: a file, or a folder of `*.txt`."""
    tokens: int
    """Maximum number of tokens to use of the data."""
    sequence_length: int
    """Tokens per sequence."""
    cache: dict[str, Any]
    """`adapmoe_config` of the engine."""
    thresholds: Sequence[float] | None = None
    """Thresholds of rule `token`; None: one for each of `DROPS`."""
    gating: bool = True
    """Whether to compare gating rules."""
    precisions: Sequence[int] = ()
    """Bits per expert weight to compare with 16, ungated: 8 and 4."""


def points(profile: ModelProfile, thresholds: Sequence[float] | None) -> list[dict[str, Any]]:
    """Returns the gating plans to compare, each with its rule and the number that sets it."""
    top_k = profile.model.top_k
    if thresholds is None:
        thresholds = [profile.threshold_for_experts(top_k - share * (top_k - 1)) for share in DROPS]
    plans = [{"rule": "token", "threshold": threshold} for threshold in thresholds]
    plans += [{"rule": "weight", "threshold": (top_k - 1) / top_k * step / 14} for step in range(1, 14)]
    plans += [{"rule": "count", "experts": 1 + step / 4} for step in range(4 * (top_k - 1))]
    sensitivity = [layer.sensitivity for layer in profile.layers]
    return [plan | {"sensitivity": sensitivity} for plan in plans]


def run_evaluate(spec: EvaluateSpec) -> dict[str, Any]:
    """Runs the held-out text through the serving engine as prompts, once per point, and part of it as decode steps.

    Raises:
        AdapMoEError: the profile is for another model, or there is no text.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # same steps, hence same sums, in every run
    from vllm_adapmoe.integration.measure.engine import Engine, load_profile
    from vllm_adapmoe.integration.measure.losses import decode_losses, prefill_losses

    profile = load_profile(spec.profile, spec.model)
    plans = points(profile, spec.thresholds) if spec.gating else []
    length = spec.sequence_length
    sequences = read_sequences(spec.model, spec.data, length, max(2, spec.tokens // length), seed=0)
    groups = [sequences[start : start + GROUP] for start in range(0, len(sequences), GROUP)]
    start = partial(
        Engine,
        spec.model,
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_batched_tokens=max(4096, length + 1),
        forced=True,
    )

    def losses(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
        parts = [prefill_losses(engine, group) for group in groups]
        nats = np.concatenate([part.nats for part in parts]).reshape(len(sequences), -1)
        return nats, np.concatenate([part.best for part in parts])

    rows = []
    with tqdm(total=len(plans) + len(spec.precisions), desc="Evaluating", unit="point") as progress:
        with start(spec.cache) as engine:
            engine.call("set_gating", None)
            base, base_best = losses(engine)
            for plan in plans:
                engine.call("set_gating", plan)
                nats, best = losses(engine)
                stats = engine.cache_stats()
                kept = stats["kept_experts"] / stats["gated_tokens"]
                rows.append(_row(plan, nats, base, float((best == base_best).mean()), kept, profile))
                progress.update()
            decode = None
            if plans:
                _compare(rows, profile.model.top_k)
                most = 0.9 * profile.model.top_k
                middle = next(
                    (plan for plan, row in zip(plans, rows, strict=True) if row["mean_experts"] < most), plans[0]
                )
                decode = _decode(engine, middle, sequences[:DECODE_SEQUENCES], decode_losses, prefill_losses)
        for bits in spec.precisions:
            with start(spec.cache | {"precision": bits}) as engine:
                engine.call("set_gating", None)
                nats, best = losses(engine)
            plan = {"rule": PRECISION, "bits": bits}
            agreement = float((best == base_best).mean())
            rows.append(_row(plan, nats, base, agreement, float(profile.model.top_k), profile))
            progress.update()
    return {
        "benchmark": "evaluate",
        "model": str(spec.model),
        "profile": str(spec.profile),
        "top_k": profile.model.top_k,
        "data": {"path": str(spec.data), "hash": data_hash(sequences), "tokens": int(base.size)},
        "base": {"loss": float(base.mean()), "perplexity": float(np.exp(base.mean()))},
        "points": rows,
        "decode": decode,
    }


def _row(
    plan: dict[str, Any],
    nats: np.ndarray,
    base: np.ndarray,
    agreement: float,
    mean_experts: float,
    profile: ModelProfile,
) -> dict[str, Any]:
    """Returns the figures of one point."""
    increase, error = relative_increase(nats, base)
    predicted = None
    if plan["rule"] == "token":
        predicted = profile.loss_increase(plan["threshold"]) / (profile.base_loss or float(base.mean()))
    return {
        "rule": plan["rule"],
        "threshold": plan.get("threshold"),
        "bits": plan.get("bits", 16),
        "mean_experts": mean_experts,
        "loss": float(nats.mean()),
        "perplexity": float(np.exp(nats.mean())),
        "loss_increase": increase,
        "loss_increase_stderr": error,
        "predicted_loss_increase": predicted,
        "top1_agreement": agreement,
    }


def relative_increase(nats: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Returns the relative increase of the mean loss and its standard error; sequences are independent.

    Args:
        nats: losses of the tokens of each sequence, `[sequences, tokens]`.
        base: losses of the same tokens without gating.
    """
    changes = (nats - base).mean(axis=1)
    error = changes.std(ddof=1) / len(changes) ** 0.5 if len(changes) > 1 else float("inf")
    return float(changes.mean() / base.mean()), float(error / base.mean())


def _decode(
    engine: Any, plan: dict[str, Any], sequences: list[list[int]], decode_losses: Any, prefill_losses: Any
) -> dict[str, Any]:
    """Compares the losses of the same tokens, gated in decode steps and gated as prompts."""
    engine.call("set_gating", plan)
    decoded = decode_losses(engine, sequences, DECODE_PROMPT)
    experts = engine.cache_stats()
    prompts = prefill_losses(engine, sequences)
    length = len(sequences[0])
    same = prompts.nats.reshape(len(sequences), length - 1)[:, DECODE_PROMPT - 1 :].reshape(-1)
    best = prompts.best.reshape(len(sequences), length - 1)[:, DECODE_PROMPT - 1 :].reshape(-1)
    return {
        "threshold": plan.get("threshold"),
        "tokens": int(same.size),
        "loss_prefill": float(same.mean()),
        "loss_decode": float(decoded.nats.mean()),
        "same_best_token": float((decoded.best == best).mean()),
        "mean_experts_decode": experts["kept_experts"] / experts["gated_tokens"],
    }


def _compare(rows: list[dict[str, Any]], top_k: int) -> None:
    """Adds to each `token` point the loss of the other rules at the same mean expert count, interpolated linearly."""
    for rule in ("weight", "count"):
        measured = [(row["mean_experts"], row["loss_increase"]) for row in rows if row["rule"] == rule]
        experts, increases = zip(*sorted([*measured, (float(top_k), 0.0)]), strict=True)
        for row in rows:
            if row["rule"] == "token":
                inside = row["mean_experts"] >= experts[0]
                value = float(np.interp(row["mean_experts"], experts, increases)) if inside else None
                row[f"{rule}_loss_increase"] = value


RULES = {"token": "sensitivity", "weight": "weight", "count": "fixed k"}
PRECISION = "precision"


def print_evaluate(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    base = result["base"]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{result['data']['tokens']} tokens; ungated {base['loss']:.4f} nats/token, "
        f"perplexity {base['perplexity']:.3f}",
    )
    for column in ("rule", "T", "kept", "loss", "ppl", "change", "±", "predicted", "top-1"):
        table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    for row in result["points"]:
        predicted = row["predicted_loss_increase"]
        table.add_row(
            f"{row['bits']} bit" if row["rule"] == PRECISION else RULES[row["rule"]],
            "" if row["threshold"] is None else f"{row['threshold']:.2g}",
            f"{row['mean_experts']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['loss_increase']:+.2%}",
            f"{row['loss_increase_stderr']:.2%}",
            "" if predicted is None else f"{predicted:+.2%}",
            f"{row['top1_agreement']:.1%}",
        )
    console.print(table)
    decode = result["decode"]
    if decode is None:
        return
    console.print(
        f"the same {decode['tokens']} tokens at threshold {decode['threshold']:.3g}: loss {decode['loss_prefill']:.4f} "
        f"gated as prompts, {decode['loss_decode']:.4f} gated in decode; same top-1 {decode['same_best_token']:.2%}"
    )


def plot_evaluate(result: dict[str, Any], path: Path) -> None:
    """Plots loss increase against mean experts per token, one line per rule."""
    from vllm_adapmoe.plot import figure

    with figure(path, "experts per token", "increase of the mean token loss, %") as axes:
        for rule, label in RULES.items():
            rows = sorted((r for r in result["points"] if r["rule"] == rule), key=lambda r: r["mean_experts"])
            if not rows:
                continue
            axes.errorbar(
                [row["mean_experts"] for row in rows],
                [100 * row["loss_increase"] for row in rows],
                [100 * row["loss_increase_stderr"] for row in rows],
                marker="o", markersize=3, linewidth=1, capsize=2, label=label,
            )  # fmt: skip
            if rule == "token":
                axes.plot(
                    [row["mean_experts"] for row in rows],
                    [100 * row["predicted_loss_increase"] for row in rows],
                    "k--", linewidth=1, label="sensitivity, predicted",
                )  # fmt: skip
        for row in result["points"]:
            if row["rule"] == PRECISION:
                axes.errorbar(
                    [row["mean_experts"]], [100 * row["loss_increase"]], [100 * row["loss_increase_stderr"]],
                    marker="s", markersize=4, capsize=2, label=f"{row['bits']} bit, ungated",
                )  # fmt: skip
        axes.invert_xaxis()
        axes.legend(frameon=False)
        axes.set_title(f"{result['model']}, top-{result['top_k']}", fontsize=9)
