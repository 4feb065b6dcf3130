"""Runs the whole check, section by section."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_check.copies import SECTION as COPIES
from benchmarks.gpu_check.copies import check_copies
from benchmarks.gpu_check.decode import SECTION as DECODE
from benchmarks.gpu_check.decode import TOKENS, WARM, Limits, check_decode
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.device_rows import check_on_device
from benchmarks.gpu_check.engines import check_engines, fitting, obstacle
from benchmarks.gpu_check.kernel_rows import BATCHES, check_kernel
from benchmarks.gpu_check.report import CORRECTNESS, ENGINES, SKIPPED, Row, attempt
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import check_refills, check_slots, check_waves
from benchmarks.gpu_check.tokens import check_tokens, plan_for
from benchmarks.gpu_check.vllm_kernel_rows import WHAT, check_vllm_kernels
from vllm_adapmoe.store.host_memory import host_memory

SECONDS = 460
"""Time limit of the whole check; parts that have not begun by then are not run."""
TOKENS_SECONDS = 240
"""Seconds from the start by which the engines whose tokens are compared must answer; correctness comes before speed."""
DECODE_SECONDS = (300, 330)
"""Seconds from the start after which decoding of the first and of the second model begins no further variant."""
MAX_HOST_BYTES = 24 << 30
"""Maximum host memory to page-lock, which is slow."""
SPARE_DEVICE_BYTES = 4 << 30
"""Device memory kept for anything but slots."""
PARTS = ("kernels", "tokens", "copies", "decode", "engines")
"""Parts of the check, in order: `tokens` and `engines` need vLLM, the others torch alone."""


@dataclass(frozen=True, kw_only=True)
class CheckSpec:
    """Models to run the check with."""

    shapes: Sequence[Shape]
    """Shapes of the models; the last one is also used for the engines."""
    dtype: torch.dtype
    """Dtype of weights."""
    seed: int
    """Random seed for everything."""
    batches: tuple[int, ...] = BATCHES
    """Numbers of tokens to call the kernel with."""
    warm: int = WARM
    """Decoded tokens that are not timed."""
    tokens: int = TOKENS
    """Decoded tokens that are timed."""
    parts: Collection[str] = PARTS
    """Parts to run."""


def run_check(device: Device, spec: CheckSpec) -> Iterator[list[Row]]:
    """Yields the rows of each part of the check of a device."""
    shapes, dtype, seed = spec.shapes, spec.dtype, spec.seed
    start = time.monotonic()

    def of(part: str) -> Sequence[Shape]:
        return shapes if part in spec.parts else ()

    for shape in of("kernels"):
        common = shape, device, dtype, seed
        yield attempt(CORRECTNESS, f"{shape.name}: kernel", lambda: check_kernel(*common, spec.batches))  # noqa: B023
        yield attempt(CORRECTNESS, f"{shape.name}: slots", lambda: check_slots(*common))  # noqa: B023
        yield attempt(CORRECTNESS, f"{shape.name}: waves", lambda: check_waves(*common))  # noqa: B023
        yield attempt(CORRECTNESS, f"{shape.name}: refills", lambda: check_refills(*common))  # noqa: B023
        yield attempt(CORRECTNESS, f"{shape.name}: on the device", lambda: check_on_device(*common))  # noqa: B023
    without = None
    if not {"tokens", "engines"}.isdisjoint(spec.parts):
        without = Row(ENGINES, "adapmoe in vLLM", "no CUDA device", "", SKIPPED) if not device.cuda else obstacle()
    if without is not None:
        yield [without]
    elif "tokens" in spec.parts:
        device.give_back()  # for the engines, which are other processes
        ends = start + TOKENS_SECONDS
        yield attempt(CORRECTNESS, WHAT, lambda: check_vllm_kernels(seed, ends))
        yield attempt(CORRECTNESS, "tokens", lambda: check_tokens(device, seed, ends, plan_for(device)))
    for shape in of("copies"):
        yield attempt(COPIES, shape.name, lambda: check_copies(shape, device, dtype, seed))  # noqa: B023
    for seconds, shape in zip(DECODE_SECONDS, of("decode"), strict=False):
        ends = start + seconds
        yield attempt(
            DECODE, shape.name,
            lambda: check_decode(shape, device, dtype, seed, _limits(device, ends, spec)),  # noqa: B023
        )  # fmt: skip
    if without is None and "engines" in spec.parts:
        device.give_back()
        try:
            reduced = fitting(shapes[-1], device.free_bytes(), host_memory().available)
        except MemoryError as error:
            yield [Row(ENGINES, "speed of engines", str(error), "", SKIPPED)]
        else:
            yield attempt(ENGINES, "speed of engines", lambda: check_engines(reduced, start + SECONDS))


def _limits(device: Device, ends: float, spec: CheckSpec) -> Limits:
    host = min(MAX_HOST_BYTES, host_memory().available // 2)
    if not device.cuda:  # slots are in host memory, too
        return Limits(host // 2, host // 2, ends, spec.warm, spec.tokens)
    return Limits(host, max(0, device.free_bytes() - SPARE_DEVICE_BYTES), ends, spec.warm, spec.tokens)
