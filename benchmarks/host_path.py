"""Measures the main thread's time in a decode step outside the expert kernel, by part, beside stock vLLM's layers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import prompts_of
from vllm_adapmoe.integration.measure.host_path import KERNEL, LAYER_PARTS, MOVE, STEP_PARTS, VLLM
from vllm_adapmoe.results import rotated, spread

MEASUREMENTS = {"cpu": ("cpu", False), "wall": ("wall", False), "instructions": ("instructions", False),
                "parts": ("cpu", True)}  # fmt: skip
"""Clock of each measurement, and whether it is by part (`HostPath.start`)."""
OF_LAYER = list(dict.fromkeys(part for _, _, part in LAYER_PARTS))
OF_STEP = list(dict.fromkeys(part for _, _, part in STEP_PARTS))
HOST_PATH = [part for part in OF_LAYER if part not in (VLLM, KERNEL, MOVE)]
STOCK = "stock"

Steps = Sequence[tuple[int, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class HostPathSpec:
    """Models and requests to measure."""

    models: Sequence[Path]
    profile: Path | None
    """Profile of the models, for next-token heads; None: none."""
    text: Path | None
    rounds: int
    batches: Sequence[int]
    prompt_tokens: int
    output_tokens: int


def run_host_path(spec: HostPathSpec) -> dict[str, Any]:
    """Measures each model with stock vLLM, with half of its experts resident, and with all but one.

    One engine at a time, in turns. All are eager, so that the layers of stock vLLM are functions that can be timed;
    what the plugin does in a layer is the same when the model is compiled.
    """
    left_out: dict[str, str] = {}
    with one_compute_thread():
        models = [_run_model(spec, model, left_out) for model in spec.models]
    return {
        "benchmark": "host_path",
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "profile": None if spec.profile is None else str(spec.profile),
        "unit": "microseconds, or thousands of instructions: parts of a layer per layer, others per step",
        "left_out": left_out,
        "models": models,
    }


@contextmanager
def one_compute_thread() -> Iterator[None]:
    """Lets engines started within the context compute with one thread.

    Several wait for one another in a kernel, and spin: on a busy machine that is CPU time of the main thread,
    milliseconds a layer.
    """
    name, core = "VLLM_CPU_OMP_THREADS_BIND", min(os.sched_getaffinity(0))
    before = os.environ.get(name)
    os.environ[name] = str(core)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _run_model(spec: HostPathSpec, model: Path, left_out: dict[str, str]) -> dict[str, Any]:
    from vllm_adapmoe.integration.measure.engine import EXTENSION, Engine
    from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint

    info, size = measure_checkpoint(model, None, None)
    shipped = {} if spec.profile is None else {"profile": str(spec.profile)}
    configurations: dict[str, dict[str, Any] | None] = {
        STOCK: None,
        "half": {"cache_experts": size.experts // 2} | shipped,
        "one_short": {"cache_experts": size.experts - 1} | shipped,
    }
    prompts = {batch: prompts_of(model, spec.text, batch, spec.prompt_tokens) for batch in spec.batches}
    measured: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    layers = 0
    for number in range(spec.rounds):
        for name in rotated(list(configurations), number):
            with Engine(
                model, configurations[name], max_model_len=spec.prompt_tokens + spec.output_tokens, enforce_eager=True,
                worker_extension_cls=EXTENSION,
            ) as engine:  # fmt: skip
                for batch in rotated(spec.batches, number):
                    engine.generate(prompts[batch], spec.output_tokens)  # warms up
                    for measurement, arguments in MEASUREMENTS.items():
                        refused = engine.call("start_host_path", *arguments)
                        if refused is not None:
                            left_out[measurement] = refused
                            continue
                        engine.generate(prompts[batch], spec.output_tokens)
                        layers, steps = engine.call("stop_host_path")
                        measured.setdefault((name, batch, measurement), []).append(figures(layers, steps))
    return {
        "model": str(model),
        "layers": layers,
        "experts": size.experts,
        "top_k": info.top_k,
        "points": [
            _point(name, batch, {each: measured[name, batch, each] for each in MEASUREMENTS if each not in left_out},
                   measured[STOCK, batch, "cpu"])
            for batch in spec.batches for name in configurations
        ],
    }  # fmt: skip


def figures(layers: int, steps: Steps) -> dict[str, float]:
    """Returns the median over decode steps of each part, and of sums of parts.

    Args:
        layers: number of MoE layers.
        steps: requests and cost of each part, of every step, in ns or instructions.
    """
    sums = {part: [part] for part in OF_LAYER} | {
        "host path": HOST_PATH,
        "stock layer": [VLLM, KERNEL],
        "layer": OF_LAYER,
    }
    values = {
        name: median(sum(cost.get(part, 0.0) for part in parts) for _, cost in steps) / layers / 1e3
        for name, parts in sums.items()
    }
    per_step = {part: median(cost.get(part, 0.0) for _, cost in steps) / 1e3 for part in OF_STEP}
    return values | per_step | {"requests": median(requests for requests, _ in steps), "steps": len(steps)}


def _point(
    name: str, batch: int, measured: dict[str, list[dict[str, float]]], stock: list[dict[str, float]]
) -> dict[str, Any]:
    ratios = {}
    if name != STOCK:
        cpu = measured["cpu"]
        pairs = zip(cpu, stock, strict=True)
        ratios = {
            "host_path_to_stock_layer": spread([own["host path"] / other["stock layer"] for own, other in pairs]),
            "host_path_to_own_stock_part": spread([own["host path"] / own["stock layer"] for own in cpu]),
        }
    return {
        "configuration": name,
        "batch": batch,
        **ratios,
        **{
            each: {figure: spread([values[figure] for values in rounds]) for figure in rounds[0]}
            for each, rounds in measured.items()
        },
    }


def print_host_path(result: dict[str, Any], console: Console) -> None:
    """Prints a table for each model: medians over the rounds, and the spread of the ratios."""
    for model in result["models"]:
        points = model["points"]
        table = Table(
            title=f"Main thread in a decode step, CPU µs per MoE layer: {model['model']}, {model['layers']} layers, "
            f"{model['experts']} experts, top-{model['top_k']}"
        )
        table.add_column("")
        for point in points:
            table.add_column(f"{point['configuration'].replace('_', ' ')}\nbatch {point['batch']}", justify="right")
        for name in HOST_PATH:
            table.add_row(name, *_medians(points, "parts", name), end_section=name == HOST_PATH[-1])
        for name in OF_STEP:
            table.add_row(f"{name}, a step", *_medians(points, "parts", name), end_section=name == OF_STEP[-1])
        for name in ("host path", MOVE, KERNEL, VLLM, "layer"):
            table.add_row(f"whole: {name}", *_medians(points, "cpu", name), end_section=name == "layer")
        table.add_row("host path, wall", *_medians(points, "wall", "host path"))
        if "instructions" not in result["left_out"]:
            table.add_row("host path, 1000 instructions", *_medians(points, "instructions", "host path"))
        for title, key in (
            ("host path / stock vLLM's layer", "host_path_to_stock_layer"),
            (f"host path / own {VLLM} + {KERNEL}", "host_path_to_own_stock_part"),
        ):
            table.add_row(title, *(_spread(point[key]) if key in point else "" for point in points))
        console.print(table)
    for measurement, reason in result["left_out"].items():
        console.print(f"{measurement} left out: {reason}", markup=False)


def _medians(points: Sequence[dict[str, Any]], clock: str, name: str) -> list[str]:
    return [f"{value:.1f}" if (value := point[clock][name]["median"]) else "" for point in points]


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}\n{ratio['min']:.2f} .. {ratio['max']:.2f}"
