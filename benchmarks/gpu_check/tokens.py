"""Compares the tokens of engines: adapmoe against stock vLLM with the same kernel, in three formats.

Each engine has a promise, which its row checks:

- `SAME_BITS`: eager, every step's experts in one wave, whether the host or the GPU decides what to load. Tokens and log
  probabilities equal stock's to the last bit. The batch is left out where stock vLLM itself answers it differently from
  run to run, as with Marlin's kernel: atomics of `moe_align_block_size` (csrc/moe/moe_align_sum_kernels.cu, from 1024
  pairs or with more than 64 experts) decide which tokens of an expert share a block, and the block decides where Marlin
  splits the sum over the hidden size.
- `ROUNDING`: in several waves, or with CUDA graphs, where the model is compiled in other pieces than stock's. A MoE
  layer's output then is the sum of the same products, rounded at other places: at most `ROUNDINGS` times, each by half
  a unit in the last place. The allowed effect is measured on stock vLLM itself: each value of each MoE layer's output
  is moved by the sum of these roundings, up or down at random, while the same tokens are forced. The mean change of the
  log probabilities must not exceed the one measured, and a request alone must give the same bits again, from other
  slots. Tokens are no measure here: in a random model of this size, another attention kernel changes every fifth of
  them.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu_check.checkpoints import write_checkpoint
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.engine_process import TOKENS, EngineFailed, EngineProcess
from benchmarks.gpu_check.report import CORRECTNESS, NOT_RUN, Row, verdict
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.units import GiB

SAME_BITS, ROUNDING = "tokens and log probabilities of stock", "stock but for rounding"
ROUNDINGS = 4
"""Number of roundings in a MoE layer: activations, each expert's output, a wave's or all experts' sum, the total."""
SHAPE = Shape("Qwen3-MoE", 4, 64, 4, 1024, 256)
VOCABULARY = 4096
PROMPTS = (7, 40, 90, 150)
"""Prompt lengths; beyond 64 tokens every expert of a layer is used, and the host decides."""
ANSWER = 24
ENGINE_BYTES = 2560 << 20
"""Device memory per engine: weights 0.5 GiB, CUDA context 0.5 GiB, graphs and allocations of a step."""
SPARE_BYTES = 1 << 30
MAX_TOGETHER = 8
OLDEST_FP8 = (8, 9)
"""Oldest compute capability with FP8 tensor cores, required by Triton's kernel; before it, Marlin widens FP8."""


@dataclass(frozen=True)
class Contender:
    """An engine of the plugin, and its promise."""

    kind: str
    """Format of the experts."""
    resident: float
    """Share of the experts that have a slot."""
    promise: str
    decode: str = "host"
    """Where decode steps decide what to load, as in the configuration."""
    eager: bool = True
    in_host: float = 1.0
    """Share of the experts that host memory holds; below 1, all are in a packed file, and host memory is a tier."""

    def name(self) -> str:
        how = "eager" if self.eager else "CUDA graphs"
        tier = "" if self.in_host == 1 else f", {self.in_host:.0%} in host memory"
        return f"{self.kind}, {self.resident:.1%} resident{tier}, decided on the {self.decode}, {how}"

    def adapmoe(self, shape: Shape, folder: Path) -> dict[str, Any]:
        """Returns the engine's `adapmoe_config`; `folder` is for packed files."""
        config = {"cache_fraction": self.resident, "scheduler": {"enabled": False}, "decode": self.decode}
        if self.in_host == 1:
            return config | {"store": "host"}
        expert_bytes = shape.layers * shape.experts * shape.layout(torch.bfloat16).nbytes
        return config | {"host_gb": self.in_host * expert_bytes / GiB, "store_dir": str(folder)}


CONTENDERS = (
    *(Contender("bf16", share, SAME_BITS, "device") for share in (0.25, 0.5)),
    *(Contender("bf16", share, SAME_BITS) for share in (0.5, 0.75, 1.0)),
    Contender("bf16", 0.125, ROUNDING),  # a prompt uses every expert of a layer, and there are slots for half of them
    *(Contender("bf16", share, ROUNDING, eager=False) for share in (0.5, 1.0)),
    *(Contender("bf16", share, ROUNDING, "device", eager=False) for share in (0.25, 0.5)),
    *(Contender(kind, share, SAME_BITS, "device") for kind in ("fp8", "gptq") for share in (0.25, 0.5)),
    *(Contender(kind, 0.75, SAME_BITS) for kind in ("fp8", "gptq")),
    *(Contender(kind, 0.5, ROUNDING, "device", eager=False) for kind in ("fp8", "gptq")),
    Contender("bf16", 0.25, SAME_BITS, in_host=0.5),
)


@dataclass
class Plan:
    """Engines to run, their model and prompts."""

    shape: Shape = SHAPE
    vocabulary: int = VOCABULARY
    prompts: Sequence[int] = PROMPTS
    answer: int = ANSWER
    contenders: Sequence[Contender] = CONTENDERS
    backends: dict[str, str] = field(default_factory=dict)
    """vLLM's kernel by format, for stock and plugin; formats without an entry use the platform's choice."""
    together: int = 1
    """Maximum engines at a time."""


def plan_for(device: Device) -> Plan:
    """Returns the plan for a machine: kernels by compute capability, as many engines at a time as fit."""
    if not device.cuda:
        return Plan()
    fp8 = "triton" if torch.cuda.get_device_capability(device.torch) >= OLDEST_FP8 else "marlin"
    backends = {"bf16": "triton", "fp8": fp8, "gptq": "marlin"}
    return Plan(backends=backends, together=engines_together(device.free_bytes(), os.cpu_count() or 1))


def engines_together(free_bytes: int, cores: int) -> int:
    """Returns how many engines can run side by side: each needs `ENGINE_BYTES` of the device, and two cores to start.

    Raises:
        MemoryError: no engine fits.
    """
    fit = (free_bytes - SPARE_BYTES) // ENGINE_BYTES
    if fit < 1:
        needed = (ENGINE_BYTES + SPARE_BYTES) / 2**30
        raise MemoryError(f"{free_bytes / 2**30:.1f} GiB of the device are free, an engine needs {needed:.1f}")
    return max(1, min(fit, cores // 2, MAX_TOGETHER))


def check_tokens(device: Device, seed: int, ends: float, plan: Plan) -> Iterator[Row]:
    """Runs stock vLLM, then every contender, and yields their rows.

    Args:
        device: device of the engines.
        seed: random seed for weights and prompts.
        ends: deadline, of `time.monotonic`.
        plan: result of `plan_for`.
    """
    chance = random.Random(seed)
    prompts = [[chance.randrange(2, plan.vocabulary) for _ in range(length)] for length in plan.prompts]
    kinds = list(dict.fromkeys(contender.kind for contender in plan.contenders))
    with TemporaryDirectory(prefix="adapmoe-gpu-check-") as folder, ThreadPoolExecutor(plan.together) as pool:
        for kind in kinds:
            write_checkpoint(Path(folder) / kind, plan.shape, kind, plan.vocabulary, device.torch, seed)
        device.give_back()

        def start(kind: str, **spec: Any) -> Callable[[], Any]:
            return pool.submit(_run, _spec(Path(folder) / kind, kind, plan, prompts, **spec), ends).result

        stock: dict[tuple[str, str, bool], Callable[[], Any]] = {}
        for contender in plan.contenders:
            key = _reference(contender)
            if key not in stock:
                eager = contender.eager
                noisy = eager and _rounds(plan, contender.kind)
                noise = ROUNDINGS * torch.finfo(torch.bfloat16).eps / 2 if noisy else None
                stock[key] = start(contender.kind, adapmoe=None, eager=eager, in_pieces=key[1] == "host", noise=noise)
        running = {}
        for contender in sorted(plan.contenders, key=lambda contender: contender.promise == ROUNDING):
            forced = None
            if contender.promise == ROUNDING:  # started last: it waits for stock's tokens
                reference = _outcome(stock[_reference(contender)])
                if not isinstance(reference, EngineFailed):
                    forced = [tokens for tokens, _ in reference["alone"]]
            adapmoe = contender.adapmoe(plan.shape, Path(folder) / "packs")
            running[contender] = start(
                contender.kind, adapmoe=adapmoe, eager=contender.eager, in_pieces=False, forced=forced
            )
        known = {key: _outcome(result) for key, result in stock.items()}
        on_device: list[tuple[Contender, Any]] = []
        for contender in plan.contenders:
            outcome = _outcome(running[contender])
            measured = known[contender.kind, "host", True] if contender.promise == ROUNDING else None
            yield compare_row(plan, contender, outcome, known[_reference(contender)], measured)
            if contender.decode == "device" and contender.promise == ROUNDING:
                on_device.append((contender, outcome))
        for kind in kinds:
            yield from agreement_rows([one for one in on_device if one[0].kind == kind])


def _reference(contender: Contender) -> tuple[str, str, bool]:
    """Returns the stock engine to compare a contender with: the one with the same mode of graphs, if it has graphs."""
    return contender.kind, "host" if contender.eager else contender.decode, contender.eager


def _rounds(plan: Plan, kind: str) -> bool:
    return any(contender.kind == kind and contender.promise == ROUNDING for contender in plan.contenders)


def _spec(
    model: Path, kind: str, plan: Plan, prompts: list[list[int]], eager: bool, in_pieces: bool, **extra: Any
) -> dict[str, Any]:
    """Returns the `Spec` of the process. `in_pieces`: piecewise CUDA graphs between attention layers, as in the plugin
    when steps need the host, instead of graphs of whole steps."""
    arguments: dict[str, Any] = {"enforce_eager": eager}
    if kind in plan.backends:
        arguments["moe_backend"] = plan.backends[kind]
    if in_pieces and not eager:
        arguments["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    return {
        "model": str(model), "prompts": prompts, "tokens": plan.answer, "device_bytes": ENGINE_BYTES,
        "arguments": arguments, **extra,
    }  # fmt: skip


def _run(spec: dict[str, Any], ends: float) -> Any:
    if time.monotonic() > ends:
        raise EngineFailed("out of time")
    with closing(EngineProcess(TOKENS, [json.dumps(spec)], ends)) as process:
        return process.answer()


def _outcome(result: Callable[[], Any]) -> Any:
    try:
        return result()
    except EngineFailed as error:
        return error


def compare_row(plan: Plan, contender: Contender, ours: Any, stock: Any, eager: Any) -> Row:
    """Compares the tokens of one engine with those of stock vLLM, compiled and eager."""
    what = f"{plan.shape.name} {contender.name()}: {contender.promise}"
    for name, engine in (("stock vLLM", stock), ("adapmoe", ours), ("stock vLLM, eager", eager)):
        if isinstance(engine, EngineFailed):
            return Row(CORRECTNESS, what, f"{name}: {engine}"[:160], "", NOT_RUN)
    details = {
        "runner": ours["runner"], "graphs": [ours["graphs"], stock["graphs"]], "kernels": ours["kernels"],
        "cache": {key: value for key, value in ours["cache"].items() if value},
    }  # fmt: skip
    if contender.decode == "device" and not ours["on_device"]:
        return Row(CORRECTNESS, what, "the host decided", "", verdict(False), details)
    if ours["kernels"] != stock["kernels"]:
        return Row(CORRECTNESS, what, f"runs {ours['kernels']}, stock {stock['kernels']}", "", verdict(False), details)
    compared = ("alone", "together") if stock["repeats"] else ("alone",)
    pairs = [pair for how in compared for pair in zip(ours[how], stock[how], strict=True)]
    total = sum(len(tokens) for _, (tokens, _) in pairs)
    equal = sum(_until_differs(answer[0], expected[0]) for answer, expected in pairs)
    same_bits = all(answer == expected for answer, expected in pairs)
    equality = f"{equal} of {total} tokens, {'the same' if same_bits else 'other'} log probabilities"
    if not stock["repeats"]:
        equality += ", requests alone: stock's batches differ from run to run"
    if contender.promise != ROUNDING:
        return Row(CORRECTNESS, what, equality, "all", verdict(equal == total and same_bits), details)
    limit = distance(eager["noisy"], eager["forced"])
    apart, best = distance(ours["forced"], stock["alone"]), agreement(ours["forced"], stock["alone"])
    again = ours["forced"] == ours["forced_again"]
    details |= {
        "repeats": again, "noise": limit, "distance": apart, "same_best": best,
        "same_best_with_noise": agreement(eager["noisy"], eager["forced"]),
        "tokens": equality,
    }  # fmt: skip
    figure = f"log probabilities apart by {apart:.4f} nats, {best:.1%} of the best tokens the same"
    if not again:
        figure += ", other bits when run again"
    return Row(CORRECTNESS, what, figure, f"<= {limit:.4f} nats", verdict(apart <= limit and again), details)


def agreement_rows(on_device: list[tuple[Contender, Any]]) -> Iterator[Row]:
    """Checks that engines whose GPU decides give the same bits at different residencies, each run twice."""
    engines = [engine for _, engine in on_device]
    if len(engines) < 2:
        return
    shares = " and ".join(f"{contender.resident:.0%}" for contender, _ in on_device)
    what = f"{on_device[0][0].kind} decided on the device, {shares} resident: the same bits, twice"
    failures = [engine for engine in engines if isinstance(engine, EngineFailed)]
    if failures:
        yield Row(CORRECTNESS, what, str(failures[0])[:160], "", NOT_RUN)
        return
    runs = [engine[key] for engine in engines if "forced" in engine for key in ("forced", "forced_again")]
    loaded = min(engine["on_device"] and engine["cache"].get("misses", 0) for engine in engines)
    met = len(runs) == 2 * len(engines) and all(run == runs[0] for run in runs) and loaded > 0
    same = sum(run == runs[0] for run in runs)
    figure = f"{same} of {2 * len(engines)} runs, {loaded:.0f} experts loaded"
    yield Row(CORRECTNESS, what, figure, "all, and some loaded", verdict(met))


def _until_differs(tokens: list[int], expected: list[int]) -> int:
    """Returns the number of tokens before the first difference."""
    pairs = zip(tokens, expected, strict=True)
    return next((number for number, (token, other) in enumerate(pairs) if token != other), len(tokens))


def distance(answers: Sequence[Any], reference: Sequence[Any]) -> float:
    """Returns the mean distance of the log probabilities of the same tokens, nats; infinite if the tokens differ."""
    if [tokens for tokens, _ in answers] != [tokens for tokens, _ in reference]:
        return float("inf")
    distances = [
        abs(step[0] - other[0])
        for (_, steps), (_, expected) in zip(answers, reference, strict=True)
        for step, other in zip(steps, expected, strict=True)
    ]
    return sum(distances) / len(distances)


def agreement(answers: Sequence[Any], reference: Sequence[Any]) -> float:
    """Returns the share of steps with the same most probable token."""
    equal = [
        step[2] == other[2]
        for (_, steps), (_, expected) in zip(answers, reference, strict=True)
        for step, other in zip(steps, expected, strict=True)
    ]
    return sum(equal) / len(equal)
