"""Clocks of the calling thread: CPU time, wall time and, where the machine counts them, instructions."""

import ctypes
import os
import platform
import struct
import time
from collections.abc import Callable

Clock = Callable[[], int]
HARDWARE, INSTRUCTIONS = 0, 1
"""`PERF_TYPE_HARDWARE` and `PERF_COUNT_HW_INSTRUCTIONS` of linux/perf_event.h."""
SYSCALLS = {"x86_64": 298, "aarch64": 241}
"""Number of `perf_event_open` by machine."""
USER_MODE = 1 << 5 | 1 << 6
"""Bits `exclude_kernel` and `exclude_hv` of `perf_event_attr`."""
CLOSE_ON_EXEC = 8


def open_counter(kind: int, event: int) -> Clock:
    """Starts to count an event of the calling thread in user mode; returns a function that reads the count.

    Args:
        kind: `perf_event_attr.type`.
        event: `perf_event_attr.config`.

    Raises:
        OSError: the machine or its kernel refuses, as most virtual machines do for hardware events.
    """
    if platform.machine() not in SYSCALLS:
        raise OSError(f"perf_event_open is not known on {platform.machine()}")
    attributes = struct.pack("=IIQQQQQIIQ", kind, 64, event, 0, 0, 0, USER_MODE, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    counter = libc.syscall(SYSCALLS[platform.machine()], attributes, 0, -1, -1, CLOSE_ON_EXEC)
    if counter < 0:
        raise OSError(ctypes.get_errno(), f"perf_event_open: {os.strerror(ctypes.get_errno())}")
    return lambda: int.from_bytes(os.read(counter, 8), "little")


def open_clock(name: str) -> Clock:
    """Returns the clock `cpu` or `wall`, in ns, or `instructions`, of the calling thread in user mode.

    Raises:
        OSError: as `open_counter`.
    """
    if name == "instructions":
        return open_counter(HARDWARE, INSTRUCTIONS)
    return {"cpu": time.thread_time_ns, "wall": time.perf_counter_ns}[name]
