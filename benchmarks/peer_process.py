"""Runs a contender's process under a memory limit from a cold page cache; records its memory use and exit."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

from benchmarks.memory_cgroup import MemoryGroup, limited_memory
from benchmarks.peer_worker import Task
from vllm_adapmoe.store.direct_io import drop_cached

INTERVAL = 0.02
"""Seconds between samples of the memory in use."""
OUT_OF_MEMORY = "out of memory"


def drop_files(*folders: str) -> None:
    """Drops the files in these folders from the page cache."""
    for path in (path for folder in folders for path in Path(folder).rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            drop_cached(fd)
        finally:
            os.close(fd)


def run_worker(task: Task, memory: int | None, timeout: float) -> dict[str, Any]:
    """Runs a contender and returns its result and resource use.

    Args:
        task: task of the contender.
        memory: bytes that the whole process tree may use, page cache included; None: no limit.
        timeout: seconds after which it is killed.

    Returns:
        The worker's result, or `failure`, a few words, and `exit_code`. Also `peak_bytes`, page cache included (None
        without a limit); `held_bytes`, the peak of anonymous and shared memory; and `load_average`, the machine's at
        the end, over the last minute: far above the number of cores, other programs were running.
    """
    drop_files(task.model, task.files)
    with ExitStack() as stack:
        group = None if memory is None else stack.enter_context(limited_memory(memory))
        output, errors = stack.enter_context(TemporaryFile("w+")), stack.enter_context(TemporaryFile("w+"))

        def enter() -> None:
            if group is not None:
                group.procs.write_text(str(os.getpid()))

        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_worker", json.dumps(asdict(task))],
            stdout=output, stderr=errors, preexec_fn=enter, start_new_session=True,
        )  # fmt: skip
        try:
            failure, unreclaimable = _watch(process, group, timeout)
            kills = 0 if group is None else group.kills()
            used = {
                "peak_bytes": None if group is None else group.peak_bytes(),
                "held_bytes": unreclaimable,
                "load_average": os.getloadavg()[0],
            }
        finally:
            _end(process, group)
        output.seek(0)
        errors.seek(0)
        lines = output.read().splitlines()
        if kills:
            failure = OUT_OF_MEMORY
        elif failure is None and process.returncode:
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            failure = f"exit code {process.returncode}: {''.join(last)[-200:]}"
        if failure is not None:
            return used | {"failure": failure, "exit_code": process.returncode}
        return used | json.loads(lines[-1])


def _watch(process: subprocess.Popen, group: MemoryGroup | None, timeout: float) -> tuple[str | None, int]:
    """Waits for the process to end; returns its failure, if any, and the peak of unreclaimable memory in bytes."""
    peak, ends = 0, time.monotonic() + timeout
    while process.poll() is None:
        peak = max(peak, _tree_bytes(process.pid) if group is None else group.unreclaimable_bytes())
        if group is not None and group.kills():  # other processes of the tree may wait for the killed one forever
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            return OUT_OF_MEMORY, peak
        if time.monotonic() > ends:
            return f"not done after {timeout:.0f} s", peak
        time.sleep(INTERVAL)
    return None, peak


def _tree_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process and its children in bytes."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        infos = [member.memory_info() for member in (process, *process.children(recursive=True))]
        return sum(info.rss - info.shared for info in infos)
    return 0


def _end(process: subprocess.Popen, group: MemoryGroup | None) -> None:
    """Kills the rest of the process tree and waits for it to end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while group is not None and (running := group.pids()):
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(INTERVAL)
