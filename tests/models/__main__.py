"""Tries every architecture of vLLM's registry that has routed experts, and writes what came out.

python -m tests.models [ARCHITECTURE ...]

Each is a tiny random checkpoint, served by stock vLLM, with half of the experts resident, and with the fewest slots.
`docs/compatibility.md` has its table from the result: `python -m tests.models.table`. Named architectures replace their
rows in the result; without names every row is made anew.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.models.architectures import Architecture, moe_architectures
from vllm_adapmoe.bench.record import environment, write

RESULT = Path(__file__).parent / "result.json"
SECONDS = 300
"""That one architecture may take."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.models", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", help="run these only")
    parser.add_argument("-o", "--out", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args()
    every = {one.name: one for one in moe_architectures()}
    unknown = set(args.architectures) - set(every)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no architecture with routed experts in vLLM's registry")
    names = args.architectures or list(every)
    rows = json.loads(args.out.read_text())["models"] if args.architectures and args.out.exists() else {}
    import_engine()
    run = environment()
    for name in tqdm(names, disable=None):
        rows[name] = describe(every[name]) | {"commit": run["commit"]} | try_one(every[name])
        kept = {one: rows[one] for one in every if one in rows}
        write(args.out, {"models": kept})


def describe(architecture: Architecture) -> dict[str, Any]:
    return {"kind": architecture.kind}


def import_engine() -> None:
    """Imports once what every model needs; each runs in a fork of this process."""
    import torch
    import torch._dynamo
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    if torch.cpu._is_amx_tile_supported():  # or stock vLLM may die of its first request
        torch.cpu._init_amx()
    torch._dynamo.config.disable = True  # vLLM compiles one function of its sampler even when eager: seconds each time
    gc.freeze()  # what is imported is not looked through again by every collection in a fork


def try_one(one: Architecture) -> dict[str, Any]:
    """Runs `run_one` in a fork; what it has told when it ends, crashes or takes too long."""
    from tests.models.run_one import run_one

    with tempfile.TemporaryDirectory() as folder:
        told, log = Path(folder, "told.json"), Path(folder, "log")
        child = os.fork()
        if child == 0:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.setsid()
            try:
                run_one(one.name, one.kind, Path(folder), told)
            finally:
                os._exit(0)
        status = wait(child, SECONDS)
        result = json.loads(told.read_text()) if told.exists() else {}
        if kept := os.environ.get("MODELS_LOGS"):
            shutil.copy(log, Path(kept) / f"{one.name}.log")
    if status != 0:
        step = list(result)[-1] if result else "checkpoint"
        end = f"more than {SECONDS} s" if status is None else f"killed by signal {os.WTERMSIG(status)}"
        result[step] = {"error": end}
    return result


def wait(child: int, seconds: float) -> int | None:
    """Waits for a child process and returns its status; None: it took too long, and was killed with its children."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
