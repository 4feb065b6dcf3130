"""Checks the machine: memory, cores, limits, and packages that some commands need."""

import ctypes
import importlib.util
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from vllm_adapmoe.doctor.finding import Finding
from vllm_adapmoe.planning.link import measure_copies
from vllm_adapmoe.store.host_memory import host_memory, memory_limit
from vllm_adapmoe.store.page_lock import OUT_OF_MEMORY, refusal
from vllm_adapmoe.units import GiB

SECTION = "Machine"
PINNED_BYTES = 1 << 26
SHARED_BYTES = 1 << 28
"""Shared memory that vLLM's processes need at most."""
OPEN_FILES = 4096
EXTRAS = {
    "matplotlib": ("plots of benchmarks, plan, evaluate and simulate", "pip install vllm-adapmoe[plot]"),
    "llama_cpp": ("llama.cpp in python -m benchmarks peers", "pip install vllm-adapmoe[peers]"),
    "accelerate": ("transformers in python -m benchmarks peers", "pip install vllm-adapmoe[peers]"),
    "ray": ("serving with Ray Serve LLM", "pip install ray[serve]"),
}


def check_machine(device: str) -> Iterator[Finding]:
    """Checks device, memory, cores and limits.

    Args:
        device: what vLLM runs on, `cpu` or `cuda`.
    """
    yield from _device(device)
    yield from _memory()
    cores, nodes = len(os.sched_getaffinity(0)), len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    quota = _cpu_quota()
    limit = "" if quota is None else f", limited to the CPU time of {quota:.1f}"
    yield Finding(SECTION, "ok", f"{cores} cores{limit}, {max(1, nodes)} NUMA node{'s' if nodes > 1 else ''}")
    yield from _limits()


def _device(device: str) -> Iterator[Finding]:
    if device == "cpu":
        if torch.cuda.is_available():
            yield Finding(
                SECTION, "note", f"{torch.cuda.get_device_name()} is present, but this vLLM is built for the CPU",
                "install vLLM for CUDA to use it", fails="the GPU is not used: this vLLM is built for the CPU",
            )  # fmt: skip
        yield Finding(SECTION, "ok", "runs on the CPU; slots are in host memory, which needs no pinning")
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            yield Finding(
                SECTION,
                "problem",
                "libnuma is missing, which vLLM's CPU kernels load",
                "on Debian: apt install libnuma1",
            )
        return
    free, total = torch.cuda.mem_get_info()
    yield Finding(
        SECTION, "ok" if free > total / 2 else "note",
        f"runs on {torch.cuda.get_device_name()}, {free / GiB:.1f} of {total / GiB:.1f} GiB free",
    )  # fmt: skip
    try:
        torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason, remedy = refusal(getattr(error, "error_code", OUT_OF_MEMORY))
        yield Finding(
            SECTION, "problem", f"no page-locked host memory ({_first_line(error)}): {reason}", remedy
        )  # fmt: skip
        return
    bandwidth = measure_copies(PINNED_BYTES)
    yield Finding(
        SECTION, "ok", f"page-locked memory works; copies to the device at {bandwidth / 1e9:.1f} GB/s",
        works=f"experts in host memory, fetched at {bandwidth / 1e9:.1f} GB/s (store=host)",
    )  # fmt: skip


def _memory() -> Iterator[Finding]:
    memory, limit, here = psutil.virtual_memory(), memory_limit(), host_memory()
    text = f"{memory.available / GiB:.1f} of {memory.total / GiB:.1f} GiB of host memory available"
    if limit is None:
        yield Finding(SECTION, "ok", text)
        return
    enough = here.available >= memory.available
    yield Finding(
        SECTION, "ok" if enough else "note",
        f"{text}; the control group allows {limit / GiB:.1f} GiB, page cache included, "
        f"of which {here.available / GiB:.1f} are still available",
        "" if enough else "set cache_gb so that the process stays below the limit",
    )  # fmt: skip


def _cpu_quota() -> float | None:
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _limits() -> Iterator[Finding]:
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    free = 0 if shm is None else shm.f_bavail * shm.f_frsize
    yield Finding(
        SECTION, "ok" if free >= SHARED_BYTES else "note", f"{free / GiB:.2f} GiB of shared memory free (/dev/shm)",
        "" if free >= SHARED_BYTES else "vLLM's processes use it; docker run --shm-size 1g, or --ipc host",
    )  # fmt: skip
    locked, (_, files) = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / GiB:.2f} GiB"
    many = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    yield Finding(
        SECTION, "ok" if many else "note", f"limits: {text} of locked memory, {files} open files",
        "" if many else "many connections need more open files; set ulimit -n 65536",
    )  # fmt: skip


def check_extras() -> Iterator[Finding]:
    """Checks the optional packages that some commands need."""
    for module, (purpose, install) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("Extras", "note", f"{module} is not installed, for {purpose}", install)
        else:
            yield Finding("Extras", "ok", f"{module}, for {purpose}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
