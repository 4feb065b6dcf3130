"""Whole engines: adapmoe against stock vLLM, and, at equal device memory, against vLLM's own ways of offloading."""

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
from vllm_adapmoe.results import spread

LAYERS = (8, 4)
"""Of the reduced model, as many as fit: groups of vLLM's prefetch offloading are of four."""
VOCABULARY = 32768
OVERHEAD_BYTES = 1792 << 20
"""Of the device for one engine besides weights: CUDA's context, KV cache, graphs, and what a step allocates."""
SPARE_BYTES = 1 << 30
"""That are left to others."""
ROUNDS, TOKENS = 5, 65
FRACTIONS = (0.5, 0.25, 0.75)
"""In the order of interest, should time run out."""
LEAST_OF_STOCK, LEAST_OF_OTHERS = 0.97, 1.0
"""Of stock vLLM's decode, with every expert resident; of its own ways of offloading, in the same device memory."""
OTHERS = {"uva": "cpu_offload_gb", "prefetch": "prefetch offloading"}


def obstacle() -> Row | None:
    """Says why there are no engines to run: without vLLM they are skipped, with it that is a failure."""
    if importlib.util.find_spec("vllm") is None:
        return Row(ENGINES, "adapmoe in vLLM", "vLLM not importable", "", SKIPPED)
    if not any(one.name == "adapmoe" for one in entry_points(group="vllm.general_plugins")):
        why = "vllm-adapmoe not installed beside vLLM (pip install --no-deps .)"
        return Row(ENGINES, "adapmoe in vLLM", why, "", NOT_RUN)
    return None


def expert_bytes(shape: Shape) -> int:
    """Of all layers, bf16."""
    return shape.layers * shape.experts * 3 * shape.hidden * shape.inner * 2


def engine_bytes(shape: Shape, resident: float, vocabulary: int = VOCABULARY) -> int:
    """Of the device, for one engine with that share of its experts."""
    attention = shape.layers * 6 * shape.hidden**2 * 2
    return int(resident * expert_bytes(shape)) + 2 * vocabulary * shape.hidden * 2 + attention + OVERHEAD_BYTES


def contenders_of(fraction: float) -> dict[str, str]:
    """Engines that run beside the plugin's, and their names."""
    return {"stock": "stock vLLM"} if fraction == 1.0 else OTHERS


def fitting(shape: Shape, device_bytes: int, host_bytes: int, fractions: Sequence[float] = FRACTIONS) -> Shape:
    """The shape with as many layers as let every comparison's engines run beside each other.

    Raises:
        MemoryError: not even the fewest do.
    """
    for layers in LAYERS:
        reduced = replace(shape, layers=layers)
        device = max((1 + len(contenders_of(one))) * engine_bytes(reduced, one) for one in (1.0, *fractions))
        # All experts of the plugin's, and what each of the others has offloaded.
        host = int(expert_bytes(reduced) * (1 + max(len(contenders_of(one)) * (1 - one) for one in (1.0, *fractions))))
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
    """Engines that are compared run beside each other and decode in turn, weights are random, batch 1.

    Args:
        shape: of the model.
        ends: until when, of `time.monotonic`.
        rounds: of every engine.
        tokens: decoded in a round.
        fractions: of experts on the device.
        vocabulary: of the model.
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
                least = LEAST_OF_STOCK if kind == "stock" else LEAST_OF_OTHERS
                yield _row(f"{what}: adapmoe / {name}", speeds["adapmoe"], speeds[kind], least)


def _measure(
    kinds: list[str], arguments: Callable[[str], list[str]], ends: float, rounds: int
) -> dict[str, list[float] | EngineFailed]:
    """Tokens per second of each engine, round by round, or why there are none."""
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
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                measured = speeds[kind]
                if isinstance(measured, EngineFailed):
                    continue
                try:
                    measured.append(engines[kind].decode())
                except EngineFailed as error:
                    speeds[kind] = error
    return speeds


def _row(what: str, ours: list[float] | EngineFailed, theirs: list[float] | EngineFailed, least: float) -> Row:
    target = f">= {least}"
    for name, one in (("adapmoe", ours), ("the other", theirs)):
        if isinstance(one, EngineFailed):
            return Row(ENGINES, what, f"{name}: {one}", target, NOT_RUN)
    assert not isinstance(ours, EngineFailed) and not isinstance(theirs, EngineFailed)
    ratio = spread([one / other for one, other in zip(ours, theirs, strict=True)])
    details = {"ratio": ratio, "adapmoe": spread(ours), "other": spread(theirs)}
    figure = (
        f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f}), {details['adapmoe']['median']:.1f} tokens/s"
    )
    return Row(ENGINES, what, figure, target, verdict(ratio["median"] >= least), details)
