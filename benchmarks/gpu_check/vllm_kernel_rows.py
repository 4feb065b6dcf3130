"""Checks vLLM's own experts kernel on pools of slots against its bits without slots, and against float64."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from benchmarks.gpu_check.engine_process import KERNELS, EngineFailed, EngineProcess
from benchmarks.gpu_check.kernel_rows import tolerance
from benchmarks.gpu_check.report import CORRECTNESS, NOT_RUN, Row, verdict

WHAT = "vLLM's Triton experts on slots"
SECONDS = 90
"""Time limit of the process."""


def check_vllm_kernels(seed: int, ends: float) -> Iterator[Row]:
    """Runs the kernels in their own process, since this package must not import vLLM; `ends`: of `time.monotonic`."""
    try:
        with closing(EngineProcess(KERNELS, [str(seed)], min(ends, time.monotonic() + SECONDS))) as process:
            cases = process.answer()
    except EngineFailed as error:
        yield Row(CORRECTNESS, WHAT, str(error), "", NOT_RUN)
        return
    yield from rows_of(cases, torch.bfloat16)


def rows_of(cases: list[dict[str, Any]], dtype: torch.dtype) -> Iterator[Row]:
    """Yields a row for each size of pool, over its cases."""
    limit = tolerance(dtype)
    for slots in dict.fromkeys(case["slots"] for case in cases):
        of_pool = [case for case in cases if case["slots"] == slots]
        error = max(case["error"] for case in of_pool)
        same = sum(case["same"] and case["dropped"] and case["nothing"] for case in of_pool)
        yield Row(
            CORRECTNESS, f"{WHAT}, a pool of {slots}: error against float64; bits without slots",
            f"{error:.2e}; {same} of {len(of_pool)} token counts", f"<= {limit:.2e}; all",
            verdict(error <= limit and same == len(of_pool)), {"cases": of_pool},
        )  # fmt: skip
