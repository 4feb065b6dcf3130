"""Wraps the CUDA functions that the check uses, with substitutes on the CPU."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from vllm_adapmoe.store.host_memory import host_memory
from vllm_adapmoe.store.page_lock import kernels_read_page_locked

BUSY_PRODUCTS = 48
"""Number of matrix products queued by `keep_busy`; each takes at least a millisecond on any GPU so far."""
BUSY_SIZE = 8192
QUERY = ("driver_version", "pcie.link.gen.max", "pcie.link.width.current")
"""Properties to query from `nvidia-smi`; the maximum link generation, since an idle link reports a lower one."""


class Device:
    """A CUDA device; or the CPU, where nothing is asynchronous."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"

    def synchronize(self) -> None:
        """Waits for all launched work."""
        if self.cuda:
            torch.cuda.synchronize()

    def finish(self) -> None:
        """Waits for work on the current stream, as a sampler does, but not for copies on other streams."""
        if self.cuda:
            torch.cuda.current_stream().synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """Times an action, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        action()
        self.synchronize()
        return time.perf_counter() - start

    def capture(self, action: Callable[[], Any]) -> Callable[[], Any]:
        """Captures an action as a CUDA graph and returns its replay; runs it once before, to compile kernels."""
        if not self.cuda:
            return action
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph.replay

    def keep_busy(self) -> None:
        """Queues work for tens of milliseconds or more, and returns at once."""
        if self.cuda:
            square = torch.zeros(BUSY_SIZE, BUSY_SIZE, dtype=torch.bfloat16, device=self.torch)
            for _ in range(BUSY_PRODUCTS):
                torch.mm(square, square)

    def mark(self) -> Callable[[], bool]:
        """Records an event in the queue; returns a function that returns whether the device has passed it."""
        if not self.cuda:
            return lambda: True
        event = torch.cuda.Event()
        event.record()
        return event.query

    def free_bytes(self) -> int:
        """Returns the memory that can be allocated, bytes."""
        if not self.cuda:
            return host_memory().available
        self.give_back()
        return torch.cuda.mem_get_info(self.torch)[0]

    def give_back(self) -> None:
        """Releases memory cached by torch."""
        if self.cuda:
            torch.cuda.empty_cache()

    def reads_host(self) -> bool:
        """Returns whether kernels can use host addresses of page-locked memory."""
        return not self.cuda or kernels_read_page_locked()

    def describe(self) -> dict[str, Any]:
        """Returns name, compute capability, memory, and, if `nvidia-smi` reports them, driver and link."""
        if not self.cuda:
            return {"name": "cpu"}
        properties = torch.cuda.get_device_properties(self.torch)
        described: dict[str, Any] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        uuid = getattr(properties, "uuid", None)
        which = [] if uuid is None else [f"--id=GPU-{uuid}"]
        command = ["nvidia-smi", *which, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError, IndexError, ValueError):
            output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            values = [value.strip() for value in output.strip().splitlines()[0].split(",")]
            described |= dict(zip(("driver", "link_generation", "link_width"), values, strict=True))
        return described
