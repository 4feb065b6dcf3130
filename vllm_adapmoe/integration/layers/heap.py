"""Returns freed memory to the operating system."""

import ctypes
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Makes the C library return freed memory to the system, if it can (glibc's `malloc_trim`).

    Otherwise glibc keeps freed blocks of up to 32 MiB below others in use: up to the size of all layers while a model
    streams through memory.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
