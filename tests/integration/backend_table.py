"""Asks vLLM for the kernel of every expert format at every compute capability, and writes it to `docs/backends.md`.

`python -m tests.integration.backend_table > docs/backends.md` takes a minute or two.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TAKES_MAPS = {"TritonExperts", "TritonWNA16Experts", "MarlinExperts"}
Matrix = dict[str, Any]


def ask(capability: str) -> Matrix:
    """What vLLM builds at a compute capability, by format."""
    return run_played("run_backends", capability)


def run_played(script: str, capability: str) -> Matrix:
    """What a script prints that plays a GPU, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-m", f"tests.integration.{script}", capability, folder],
            capture_output=True, text=True, timeout=300, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


def markdown(matrices: dict[str, Matrix], version: str) -> str:
    """Two tables: what is set, and what vLLM builds by itself."""
    formats = [name for name in matrices[CAPABILITIES[0]] if name != "wishes"]

    def table(cell: Any) -> str:
        rows = [f"| experts | {' | '.join(CAPABILITIES)} |", "|---|" + "---|" * len(CAPABILITIES)]
        for name in formats:
            rows.append(f"| {name} | {' | '.join(cell(matrices[at][name]) for at in CAPABILITIES)} |")
        return "\n".join(rows)

    return HEAD.format(version=version, ours=table(_ours), stock=table(_stock))


def _ours(cell: dict[str, Any]) -> str:
    told = cell["with"]["ours"]
    return told["backend"] if "kernel" in told else "refused" if "refused" in told else "not in vLLM"


def _stock(cell: dict[str, Any]) -> str:
    names = [_kernel(cell[packages]["stock"]) for packages in ("with", "without")]
    return names[0] if names[0] == names[1] else f"{names[0]} (without: {names[1]})"


def _kernel(told: dict[str, Any]) -> str:
    if "kernel" not in told:
        return "none"
    name = told["kernel"].replace("Experts", "")
    return name if told["kernel"] in TAKES_MAPS else f"*{name}*"


HEAD = """# Which kernel computes the experts

Experts in slots need a kernel of vLLM that takes a map from expert to slot: `TritonExperts`, `TritonWNA16Experts` or
`MarlinExperts`. By itself vLLM often chooses another one, so the method sets `--moe-backend` before anything is loaded,
and says so in one line. What you set yourself is kept where it works; where it does not, it is refused, with the value
that works.

This file is written by `python -m tests.integration.backend_table`, from vLLM {version}'s own Python with the platform
played; a test compares it with what that finds. It is about which kernel is chosen; no GPU was asked.

## What is set

By compute capability: 8.0 is an A100, 8.6 a 3090, 8.9 a 4090, 9.0 an H100, 10.0 a B200, 12.0 a 5090. "refused": no
kernel of vLLM computes these experts on part of them; the error says what to use instead. "not in vLLM": vLLM itself
does not serve this there.

{ours}

## What vLLM would choose

Kernels in *italics* take no map. FlashInfer and Humming come with vLLM; "without" is a build without them.

{stock}
"""

if __name__ == "__main__":
    from importlib.metadata import version

    print(markdown({at: ask(at) for at in CAPABILITIES}, version("vllm").partition("+")[0]), end="")
