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
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.models.architectures import Architecture, moe_architectures
from tests.models.table import RESULT
from vllm_adapmoe.results import environment, write

SECONDS = 300
"""That one architecture may take."""
NOT_RUN = {"checkpoint": {"cannot": "not run yet"}}


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of `wait`, which ends the child
    commit = environment()["commit"]
    for name in tqdm(names, disable=None):
        rows[name] = {"kind": every[name].kind, "commit": commit} | try_one(every[name])
        write(args.out, {"models": {one: rows.get(one, NOT_RUN) for one in every}})


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

    if one.kind == "draft":
        return {"checkpoint": {"cannot": "a draft model, which needs a target; its experts are not cached"}}
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
        text = log.read_text(errors="replace")
        if kept := os.environ.get("MODELS_LOGS"):
            Path(kept, f"{one.name}.log").write_text(text)
    step = list(result)[-1] if result else "checkpoint"
    if status != 0:
        end = f"more than {SECONDS} s" if status is None else f"killed by signal {os.WTERMSIG(status)}"
        result[step] = {"error": end}
    missing = re.findall(r"ModuleNotFoundError: .*", text)
    if missing and "error" in result[step]:  # vLLM imports models in a process of its own, and says to look at its log
        result[step]["error"] = missing[-1]
    return result


def wait(child: int, seconds: float) -> int | None:
    """Waits for a child process and returns its status; None: it took too long.

    However this ends, the child and its children have ended, too.
    """
    end = time.monotonic() + seconds
    status = None
    try:
        while status is None and time.monotonic() < end:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
