"""Compiles the loops of the policies with numba, which vLLM installs."""

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from numba import njit
except ImportError:  # a machine with torch and numpy alone, without vLLM: slower, with the same results
    njit = None

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiles a function of arrays and numbers at its first call; later processes read the code from numba's cache.

    An index out of bounds raises IndexError, as without numba.
    """
    if njit is None:
        return function
    try:
        return njit(cache=True, boundscheck=True)(function)
    except RuntimeError:  # no folder for the cache can be written: compiled in every process
        return njit(boundscheck=True)(function)
