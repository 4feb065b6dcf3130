"""Compiles the loops of the policies with numba, which vLLM installs."""

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from numba import njit
except ImportError:  # a machine with torch and numpy alone, without vLLM: slower, with the same results
    njit = None
Function = TypeVar("Function", bound=Callable[..., Any])
FUNCTIONS: list[Callable[..., Any]] = []
"""All functions compiled by numba. Each is compiled, or read from numba's cache, at its first call with other types."""


def compiled(function: Function) -> Function:
    """Compiles a function of arrays and numbers at its first call; later processes read the code from numba's cache.

    An index out of bounds raises IndexError, as without numba. Pass arrays to be filled, and return numbers: numba
    unpickles the dtype of every array that a function returns, which takes as long as the rest of a call.
    """
    if njit is None:
        return function
    fast = _jit(function, boundscheck=True)
    FUNCTIONS.append(fast)
    return fast


def vectorised(function: Function) -> Function:
    """Compiles a loop over many numbers at its first call: indices are not checked, and sums may be reordered."""
    if njit is None:
        return function
    return _jit(function, fastmath={"reassoc", "contract", "nsz", "arcp"}, nogil=True)


def _jit(function: Function, **options: Any) -> Function:
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written: compiled in every process
        return njit(**options)(function)


def _hide_special_attributes() -> None:
    """Makes llvmlite's wrapper of LLVM's library answer for LLVM's functions alone; it answers for every name.

    vLLM's CPU platform reads `__dict__` of all objects in all modules when an engine starts (`_rebind_kernels` of
    vllm/triton_utils/dispatcher.py), and fails on the function that it gets once LLVM is loaded.
    """
    from llvmlite.binding import ffi

    wrapper = getattr(ffi, "_lib_wrapper", None)
    if wrapper is None:
        return
    find = wrapper.__getattr__

    def find_function(library: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(library, name)

    wrapper.__getattr__ = find_function


if njit is not None:
    _hide_special_attributes()
