"""Gives memory that was freed back to the system."""

import ctypes
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Lets the C library give back what it keeps of freed memory, where it can (glibc's `malloc_trim`).

    By itself it keeps blocks of up to 32 MiB below others that are in use: while a model streams through memory, as
    much as all layers together.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
