"""Compares engines: adapmoe with stock vLLM, and, at equal device memory, with vLLM's own offloading."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu_check.checkpoints import model_config
from benchmarks.gpu_check.engine_process import SPEED, EngineFailed, EngineProcess
from benchmarks.gpu_check.report import ENGINES, NOT_RUN, SKIPPED, Row, verdict
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.results import rotated, spread

LAYERS = (8, 4)
"""Layers of the reduced model, the first that fits; multiples of four, the group size of vLLM's prefetch offloading."""
VOCABULARY = 32768
OVERHEAD_BYTES = 1792 << 20
"""Device memory per engine besides weights: CUDA context, KV cache, graphs, and allocations of a step."""
SPARE_BYTES = 1 << 30
"""Memory left free, on device and host."""
ROUNDS, TOKENS = 5, 65
FRACTIONS = (0.5, 0.25, 0.75)
"""Residencies to measure, the most interesting first in case time runs out."""
MIN_OF_STOCK, MIN_OF_OFFLOADING = 0.97, 1.0
"""Minimum decode speed relative to stock vLLM with every expert resident, and to vLLM's offloading in equal memory."""
OFFLOADING = {"uva": "cpu_offload_gb", "prefetch": "prefetch offloading"}


def obstacle() -> Row | None:
    """Returns a row with the reason why no engine can run: skipped without vLLM, else a failure; None if they can."""
    if importlib.util.find_spec("vllm") is None:
        return Row(ENGINES, "adapmoe in vLLM", "vLLM not importable", "", SKIPPED)
    if not any(plugin.name == "adapmoe" for plugin in entry_points(group="vllm.general_plugins")):
        why = "vllm-adapmoe not installed in vLLM's environment (pip install --no-deps .)"
        return Row(ENGINES, "adapmoe in vLLM", why, "", NOT_RUN)
    return None


def expert_bytes(shape: Shape) -> int:
    """Returns the bytes of all experts of all layers, bf16."""
    return shape.layers * shape.experts * 3 * shape.hidden * shape.inner * 2


def engine_bytes(shape: Shape, resident: float, vocabulary: int = VOCABULARY) -> int:
    """Returns the device memory of one engine with this fraction of its experts resident."""
    attention = shape.layers * 6 * shape.hidden**2 * 2
    return int(resident * expert_bytes(shape)) + 2 * vocabulary * shape.hidden * 2 + attention + OVERHEAD_BYTES


def contenders_of(fraction: float) -> dict[str, str]:
    """Returns the engines to compare the plugin with at a residency, and their names."""
    return {"stock": "stock vLLM"} if fraction == 1.0 else OFFLOADING


def fitting(shape: Shape, device_bytes: int, host_bytes: int, fractions: Sequence[float] = FRACTIONS) -> Shape:
    """Returns the shape with as many layers as allow the engines of every comparison to run side by side.

    Raises:
        MemoryError: the fewest layers do not fit.
    """
    for layers in LAYERS:
        reduced = replace(shape, layers=layers)
        compared = {share: len(contenders_of(share)) for share in (1.0, *fractions)}
        device = max((1 + count) * engine_bytes(reduced, share) for share, count in compared.items())
        # All experts of the plugin's engine, and the offloaded ones of each other engine.
        host = int(expert_bytes(reduced) * (1 + max(count * (1 - share) for share, count in compared.items())))
        if device + SPARE_BYTES <= device_bytes and host + SPARE_BYTES <= host_bytes:
            return reduced
    needed = (
        f"{(device + SPARE_BYTES) / 2**30:.1f} GiB of the device and {(host + SPARE_BYTES) / 2**30:.1f} of the host"
    )
    raise MemoryError(
        f"{layers} layers need {needed}, {device_bytes / 2**30:.1f} and {host_bytes / 2**30:.1f} are free"
    )


def check_engines(
    shape: Shape, ends: float, rounds: int = ROUNDS, tokens: int = TOKENS, fractions: Sequence[float] = FRACTIONS,
    vocabulary: int = VOCABULARY,
) -> Iterator[Row]:  # fmt: skip
    """Compares engines that live side by side and decode in turn, with random weights at batch 1.

    Args:
        shape: shape of the model.
        ends: deadline, of `time.monotonic`.
        rounds: measurements of every engine.
        tokens: tokens decoded per round.
        fractions: fractions of the experts on the device.
        vocabulary: vocabulary size of the model.
    """
    with TemporaryDirectory(prefix="adapmoe-gpu-check-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(shape, vocabulary)))
        for fraction in (1.0, *fractions):
            contenders = contenders_of(fraction)
            what = f"{shape.name}, {shape.layers} layers, {fraction:.0%} of the experts resident"
            if time.monotonic() > ends:
                yield Row(ENGINES, what, "out of time", "", NOT_RUN if fraction == 1.0 else SKIPPED)
                continue
            rest = (str(fraction), str(expert_bytes(shape)), str(tokens), str(engine_bytes(shape, fraction)))
            speeds = _measure(["adapmoe", *contenders], lambda kind: [folder, kind, *rest], ends, rounds)  # noqa: B023
            for kind, name in contenders.items():
                min_ratio = MIN_OF_STOCK if kind == "stock" else MIN_OF_OFFLOADING
                yield _row(f"{what}: adapmoe / {name}", speeds["adapmoe"], speeds[kind], min_ratio)


def _measure(
    kinds: list[str], arguments: Callable[[str], list[str]], ends: float, rounds: int
) -> dict[str, list[float] | EngineFailed]:
    """Returns the tokens per second of each engine round by round, or its failure."""
    speeds: dict[str, list[float] | EngineFailed] = {}
    with ExitStack() as stack:
        engines = {kind: stack.enter_context(closing(EngineProcess(SPEED, arguments(kind), ends))) for kind in kinds}
        for kind, engine in list(engines.items()):
            try:
                engine.answer()
                speeds[kind] = []
            except EngineFailed as error:
                speeds[kind] = error
        for number in range(rounds):
            for kind in rotated(kinds, number):
                measured = speeds[kind]
                if isinstance(measured, EngineFailed):
                    continue
                try:
                    measured.append(engines[kind].decode())
                except EngineFailed as error:
                    speeds[kind] = error
    return speeds


def _row(what: str, ours: list[float] | EngineFailed, baseline: list[float] | EngineFailed, min_ratio: float) -> Row:
    target = f">= {min_ratio}"
    for name, speeds in (("adapmoe", ours), ("the other engine", baseline)):
        if isinstance(speeds, EngineFailed):
            return Row(ENGINES, what, f"{name}: {speeds}", target, NOT_RUN)
    assert not isinstance(ours, EngineFailed) and not isinstance(baseline, EngineFailed)
    ratio = spread([speed / base for speed, base in zip(ours, baseline, strict=True)])
    details = {"ratio": ratio, "adapmoe": spread(ours), "other": spread(baseline)}
    figure = (
        f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f}), {details['adapmoe']['median']:.1f} tokens/s"
    )
    return Row(ENGINES, what, figure, target, verdict(ratio["median"] >= min_ratio), details)
