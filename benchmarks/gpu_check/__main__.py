"""Checks the device path on a GPU (correctness, copies, decode, engines), prints a table and writes JSON."""

import argparse
import secrets
import sys
from pathlib import Path

NAME = "gpu-check"
OLDEST_PYTHON = (3, 11)
LAST_SECOND = 475
"""Seconds after which the check ends itself, in case the device path hangs."""


def main() -> int:
    """Runs the command; returns exit status 0, 1 if the check failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write the result to")
    parser.add_argument("--seed", type=int, help="random seed; drawn if not given; stored in the result")
    parser.add_argument(
        "--parts", metavar="PART,...",
        help="parts to run, of kernels, tokens, copies, decode, engines; default: all, which takes eight minutes",
    )  # fmt: skip
    options = parser.parse_args()
    problem = _problem()
    if problem is not None:
        print(f"{NAME}: {problem}; nothing was run", file=sys.stderr)
        return 2
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    return run(options.output, seed, options.parts)


def _problem() -> str | None:
    """Returns why nothing can be run; None if it can."""
    if sys.version_info < OLDEST_PYTHON:
        return f"Python {sys.version.split()[0]} is too old, 3.11 it must be (GPU_PYTHON=...)"
    try:
        import torch
    except ImportError:
        return f"no torch in {sys.executable} (GPU_PYTHON=...)"
    if not torch.cuda.is_available():
        return f"no CUDA device found by torch {torch.__version__}"
    return None


def run(output: Path, seed: int, chosen: str | None = None) -> int:
    """Runs the check on the CUDA device at the shapes of real models; returns the exit status."""
    import torch
    import triton

    from benchmarks.gpu_check.check import PARTS, CheckSpec, run_check
    from benchmarks.gpu_check.device import Device
    from benchmarks.gpu_check.report import Result
    from benchmarks.gpu_check.shapes import MIXTRAL, QWEN3

    parts = PARTS if chosen is None else tuple(chosen.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        print(f"{NAME}: --parts: no part {unknown[0]!r}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    device = Device("cuda")
    described = device.describe() | {"triton": triton.__version__}
    title = f"{described['name']}, torch {torch.__version__}, Triton {triton.__version__}, seed {seed}"
    command = f"python -m {__package__} {' '.join(sys.argv[1:])}"
    result = Result(output, title, {"command": command, "device": described}, seed)
    with result.ended_after(LAST_SECOND):
        spec = CheckSpec(shapes=(MIXTRAL, QWEN3), dtype=torch.bfloat16, seed=seed, parts=parts)
        for part in run_check(device, spec):
            result.add(part)
    return result.end()


if __name__ == "__main__":
    sys.exit(main())
