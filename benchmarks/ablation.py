"""Measures the effect of gating, prefetch and cache policy, alone and together, on a link of a given bandwidth."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.residency import ON_DEMAND
from benchmarks.workload import Workload, measure, measure_batches, prompts_of, ratios
from vllm_adapmoe.calibrate.evaluate import relative_increase
from vllm_adapmoe.config import AdapMoEConfig, GatingConfig
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.profile.thresholds import plan_gating
from vllm_adapmoe.results import rotated, spread
from vllm_adapmoe.simulate.replay import belady, replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.simulate.virtual_link import Machine

PARTS = ("gating", "prefetch", "cache")
GRID = [[part for bit, part in enumerate(PARTS) if number >> bit & 1] for number in range(8)]
WITHOUT = ON_DEMAND | {"allocation": "pool"}
"""Settings for fetch on demand, the baseline of `python -m benchmarks residency`."""
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "base": {"allocation": "uniform"},
        "prefetch": {"prefetch": {"lookahead": 1, "max_experts": 2}},
        "cache": {"allocation": "profile"},
    },
    "ours": {"base": {}, "prefetch": {"prefetch": {}}, "cache": {"eviction": "next_token"}},
}
"""Combinations by family. The paper's: LRU in each layer, prefetch of the next layer's top experts, slots of layers by
dynamic programming. And ours."""
GATING = {"paper": "token", "ours": "batch"}


@dataclass(frozen=True, kw_only=True)
class AblationSpec(Workload):
    """Requests to measure the combinations on, and the cache and link that serve them."""

    profile: Path
    batches: int
    """Batches per measurement, one after another."""
    resident: float
    """Fraction of the experts that have a slot."""
    ratio: float
    """Time to fetch one expert over the time of one layer with every expert resident; sets the link bandwidth."""
    max_loss_increase: float
    """Relative loss increase allowed to gating."""
    loss_tokens: int
    """Tokens on which the loss of gating is measured, with an unlimited link."""

    def groups(self) -> list[list[list[int]]]:
        """Returns the token ids of the requests of each batch, output included."""
        requests = prompts_of(self.model, self.text, self.batch * self.batches, self.length)
        return [requests[start : start + self.batch] for start in range(0, len(requests), self.batch)]


def run_ablation(spec: AblationSpec) -> dict[str, Any]:
    """Decodes with every combination in turn on one engine; the order rotates by one each round.

    Each combination starts with an empty cache and warms it with two batches before it is timed.
    """
    from vllm_adapmoe.integration.measure.engine import Engine, count_experts, load_profile
    from vllm_adapmoe.integration.measure.losses import decode_losses

    profile = load_profile(spec.profile, spec.model)
    groups = spec.groups()
    # Decode given text: a model this small repeats itself, and would reuse the same experts.
    arguments: dict[str, Any] = {"max_model_len": spec.length, "forced": True}

    def timed(engine: Any) -> dict[str, Any]:
        return measure_batches(engine, groups, spec.output_tokens, forced=True)

    with Engine(spec.model, {"cache_fraction": 1.0}, **arguments) as full:
        measure(full, groups[-1], spec.output_tokens, forced=True)
        speeds = [timed(full)["decode_tokens_per_second"] for _ in range(3)]
    layers = profile.model.num_layers
    layer_seconds = spec.batch / max(speeds) / layers
    plans = {
        family: plan_gating(GatingConfig(**{"mode": mode, "max_loss_increase": spec.max_loss_increase}), profile)  # type: ignore[arg-type]
        for family, mode in GATING.items()
    }
    threshold = profile.threshold_for_loss(spec.max_loss_increase)
    combinations = {f"{family}: {'+'.join(parts) or 'base'}": (family, parts) for family in FAMILIES for parts in GRID}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in combinations}
    slots = round(spec.resident * count_experts(spec.model))
    config = WITHOUT | {"cache_experts": slots, "store": "host", "profile": str(spec.profile)}
    with Engine(spec.model, config, **arguments) as engine, TemporaryDirectory() as folder:
        engine.call("time_parts")
        expert_bytes = engine.call("largest_expert_bytes")
        link = expert_bytes / (spec.ratio * layer_seconds)

        def switch(name: str, **overrides: Any) -> None:
            family, parts = combinations[name]
            plan = plans[family] if "gating" in parts else None
            engine.call("set_gating", None if plan is None else plan.model_dump())
            settings, curves = _settings(family, parts, profile, threshold)
            engine.call("set_cache", settings | {"link_gbps": link / 1e9} | overrides, curves)

        def warm() -> None:
            measure_batches(engine, groups[-2:], spec.output_tokens, forced=True)

        # With gating by batch, dropping depends on the cache, so each combination needs a separate trace.
        traces = {}
        for name in tqdm([name for name in combinations if name == _trace_of(name)], desc="Recording", unit="trace"):
            trace = Path(folder) / name.replace(" ", "")
            switch(name, trace_out=str(trace))
            warm()
            timed(engine)
            switch("ours: base")  # ends the trace
            info, recorded = read_trace(trace)
            traces[name] = info, list(recorded)
        for number in tqdm(range(spec.rounds), desc="Measuring", unit="round"):
            for name in rotated(list(combinations), number):
                switch(name)
                warm()
                before = engine.call("part_seconds")
                result = timed(engine)
                after = engine.call("part_seconds")
                measured[name].append(result | {"parts": {key: after[key] - before[key] for key in after}})
        losses = {}
        if spec.loss_tokens:
            texts = prompts_of(spec.model, spec.text, max(1, spec.loss_tokens // spec.output_tokens), spec.length)
            for name in ("ours: base", "paper: gating+prefetch+cache", "ours: gating+prefetch+cache"):
                switch(name, link_gbps=None)
                bar = tqdm(texts, desc=f"Loss, {name}", unit="request")
                losses[name] = np.array([decode_losses(engine, [ids], spec.prompt_tokens).nats for ids in bar])
    tokens = spec.batch * spec.batches * spec.length
    compute = _compute_seconds(measured["ours: base"], spec.batches * spec.output_tokens)
    points = []
    for name, (family, parts) in combinations.items():
        info, steps = traces[_trace_of(name)]
        point = _point(measured[name], measured["ours: base"], measured[f"{family}: base"], tokens)
        setup = _setup(family, parts, profile, threshold, slots)
        predicted = _predicted_speed(info, steps, setup, Machine(link, compute / layers), spec.batches)
        points.append(
            {"family": family, "parts": parts}
            | point
            | {
                "simulated_tokens_per_second": predicted,
                "simulated_of_measured": predicted / point["decode_tokens_per_second"]["median"],
            }
        )
    oracle = {"ungated": "ours: base", "gated by token": "paper: gating"}
    return {
        "benchmark": "ablation",
        **spec.described(),
        "profile": str(spec.profile),
        "resident": spec.resident,
        "batches": spec.batches,
        "expert_bytes": expert_bytes,
        "ratio": spec.ratio,
        "resident_layer_seconds": layer_seconds,
        "resident_tokens_per_second": spread(speeds),
        "link_gbps": link / 1e9,
        "threshold": threshold,
        "mean_experts": profile.mean_experts(threshold),
        "predicted_loss_increase": profile.loss_increase(threshold) / (profile.base_loss or 1),
        "belady_bytes_per_token": {key: _oracle_bytes(*traces[name], slots) for key, name in oracle.items()},
        "loss_tokens": spec.loss_tokens // spec.output_tokens * spec.output_tokens,
        "measured_loss_increase": {
            name: dict(zip(("mean", "stderr"), relative_increase(nats, losses["ours: base"]), strict=True))
            for name, nats in losses.items()
            if name != "ours: base"
        },
        "points": points,
    }


def _trace_of(name: str) -> str:
    """Returns the combination whose trace `name` is replayed from; combinations with the same routing share one."""
    if "gating" not in name:
        return "ours: base"
    return name if name.startswith("ours") else "paper: gating"


def _settings(
    family: str, parts: list[str], profile: ModelProfile, threshold: float
) -> tuple[dict[str, Any], list[list[float]] | None]:
    """Returns the `adapmoe_config` of a combination, and expected loads if its allocation needs them."""
    choices = FAMILIES[family]
    settings = WITHOUT | choices["base"] | {"profile": "measured"}
    for part in parts:
        settings |= choices.get(part, {})
    if settings["allocation"] != "profile":
        return settings, None
    ahead = settings["prefetch"].get("max_experts", 1) if "prefetch" in parts else 0
    curves = curves_of_profile(profile, threshold if "gating" in parts else 0.0, ahead)
    return settings, [curve.tolist() for curve in curves]


def _setup(family: str, parts: list[str], profile: ModelProfile, threshold: float, slots: int) -> CacheSetup:
    settings, curves = _settings(family, parts, profile, threshold)
    return CacheSetup.from_config(AdapMoEConfig.parse(settings), [slots], curves)


def _compute_seconds(rounds: list[dict[str, Any]], steps: int) -> float:
    """Returns the compute time per step, without fetches; the prompt step of a batch counts like the others."""
    return median([(result["seconds"] - result["cache"]["stall_seconds"]) / steps for result in rounds])


def _timed_from(steps: list[Step], batches: int) -> int:
    """Returns the first step of a trace after the batches that warm the cache."""
    first = [number for number, step in enumerate(steps) if step.positions[0] == 0]
    return first[len(first) - batches]


def _predicted_speed(info: TraceInfo, steps: list[Step], setup: CacheSetup, machine: Machine, batches: int) -> float:
    """Predicts decoded tokens per second, after the batches that warm the cache."""
    seconds = replay(info, steps, setup, machine).step_seconds
    decode = [n for n in range(_timed_from(steps, batches), len(steps)) if (steps[n].positions > 0).all()]
    return sum(len(steps[n].positions) for n in decode) / sum(seconds[n] for n in decode)


def _oracle_bytes(info: TraceInfo, steps: list[Step], slots: int) -> float:
    """Returns the bytes per token that Belady's cache would move, warm-up included."""
    loads = belady(info, steps, [slots])
    return float(loads @ np.array(info.expert_bytes)) / sum(len(step.positions) for step in steps)


def _point(
    rounds: list[dict[str, Any]],
    base: list[dict[str, Any]],
    family_base: list[dict[str, Any]],
    tokens: int,
) -> dict[str, Any]:
    return {
        "decode_ratio": ratios(rounds, base, "decode_tokens_per_second"),
        "ratio_to_own_base": ratios(rounds, family_base, "decode_tokens_per_second"),
        "decode_tokens_per_second": spread([result["decode_tokens_per_second"] for result in rounds]),
        "demand_loads_per_token": spread([result["cache"]["demand_loads"] / tokens for result in rounds]),
        "fetched_bytes_per_token": spread([result["cache"]["fetched_bytes"] / tokens for result in rounds]),
        "wasted_bytes_per_token": spread([result["cache"]["wasted_bytes"] / tokens for result in rounds]),
        "stall_share": spread([result["cache"]["stall_seconds"] / result["seconds"] for result in rounds]),
        "lookahead_share": spread([result["parts"]["lookahead"] / result["seconds"] for result in rounds]),
    }


def print_ablation(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(
        title=f"{result['resident']:.0%} resident, {result['ratio']:g} layers to move an expert, batch "
        f"{result['batch']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("policies", "with", "of LRU", "min .. max", "own base", "loads", "MiB", "sim."):
        table.add_column(column, justify="left" if column in ("policies", "with") else "right", no_wrap=True)
    for point in result["points"]:
        ratio = point["decode_ratio"]
        table.add_row(
            point["family"],
            "+".join(point["parts"]) or "base",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} .. {ratio['max']:.2f}",
            f"{point['ratio_to_own_base']['median']:.2f}",
            f"{point['demand_loads_per_token']['median']:.2f}",
            f"{point['fetched_bytes_per_token']['median'] / 2**20:.1f}",
            f"{point['simulated_of_measured']:.2f}",
        )
    console.print(table)
    oracle = result["belady_bytes_per_token"]
    looking = max(point["lookahead_share"]["median"] for point in result["points"])
    console.print(
        f"loads, MiB: demand loads and MiB moved per token; Belady's cache without prefetch: "
        f"{oracle['ungated'] / 2**20:.1f} MiB, gated by token {oracle['gated by token'] / 2**20:.1f}; sim.: tokens/s "
        f"predicted by a replay, of measured; link {result['link_gbps']:.2f} GB/s; gating by token keeps "
        f"{result['mean_experts']:.2f} experts; prediction takes up to {looking:.0%} of the time"
    )
    for name, loss in result["measured_loss_increase"].items():
        console.print(f"loss, {name}: {loss['mean']:+.2%} ± {loss['stderr']:.2%} of {result['loss_tokens']} tokens")
