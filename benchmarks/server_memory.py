"""Measures the memory of a server's processes, stock vLLM's and the plugin's, beside what importing vLLM takes."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.server import Server
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.results import rotated, spread
from vllm_adapmoe.units import MiB

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {"stock": None, "adapmoe": {"cache_fraction": 0.5}}
KV_CACHE_BYTES = 64 * MiB
IMPORTS = "import vllm.entrypoints.llm, vllm.v1.engine.core; print(flush=True); input()"
"""What a process of an engine imports before it does anything."""
KINDS = {"Pss": "pss_bytes", "Pss_Anon": "anonymous_bytes", "Pss_File": "file_bytes"}
PROCESSES = {"VLLM::EngineCore": "engine core", "VLLM::Worker": "worker"}


def run_server_memory(model: Path, rounds: int) -> dict[str, Any]:
    """Starts each server in turn, sends a request, and reads the memory of its processes.

    Raises:
        AdapMoEError: a server does not start, or this kernel does not report memory by process.
    """
    runs: dict[str, list[dict[str, dict[str, int]]]] = {name: [] for name in CONFIGURATIONS}
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in rotated(list(CONFIGURATIONS), number):
                flags = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
                with Server(name, model, Path(folder), CONFIGURATIONS[name], flags) as server:
                    server.complete(prompt="The", max_tokens=32)
                    runs[name].append(_of_server(server))
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        imports = memory_of(process.pid)
        process.kill()
    return {
        "benchmark": "server_memory",
        "model": os.path.relpath(model),
        "kv_cache_bytes": KV_CACHE_BYTES,
        "imports": imports,
        "servers": {name: _figures(measured) for name, measured in runs.items()},
    }


def _of_server(server: Server) -> dict[str, dict[str, int]]:
    """Returns the memory of each process, by its role, and of all together."""
    memory = {}
    for number, process in enumerate(server.processes()):
        title = process.cmdline()[0]
        role = "api server" if number == 0 else next((role for key, role in PROCESSES.items() if key in title), "other")
        memory[role] = memory_of(process.pid)
    return memory | {"all": {kind: sum(part[kind] for part in memory.values()) for kind in KINDS.values()}}


def memory_of(pid: int) -> dict[str, int]:
    """Returns bytes of a process: proportional to its share of each page, and of that anonymous, and in files.

    Raises:
        AdapMoEError: this kernel does not report it.
    """
    path = Path(f"/proc/{pid}/smaps_rollup")
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise AdapMoEError(f"{path} cannot be read ({error.strerror}); run on Linux, as the same user") from None
    values = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return {kind: int(values[key].split()[0]) * 1024 for key, kind in KINDS.items()}


def _figures(measured: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, Any]]:
    return {
        role: {kind: spread([run[role][kind] for run in measured]) for kind in KINDS.values()} for role in measured[0]
    }


def print_server_memory(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Memory of a server, MiB: {result['model']}")
    for column in ("", "process", "all", "anonymous", "files"):
        table.add_column(column, justify="left" if column in ("", "process") else "right", no_wrap=True)
    for name, roles in result["servers"].items():
        for role, kinds in roles.items():
            table.add_row(name, role, *(f"{kinds[kind]['median'] / MiB:.0f}" for kind in KINDS.values()))
    table.add_row("", "imports of vLLM", *(f"{result['imports'][kind] / MiB:.0f}" for kind in KINDS.values()))
    console.print(table)
    console.print(
        "all: each page counted by its share, so that the processes add up; files: code and libraries, which the "
        "system can read again",
        highlight=False,
    )
