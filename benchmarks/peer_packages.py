"""Checks for the optional packages that the peers need; a missing one is reported in one line."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllm_adapmoe.config import AdapMoEError

PACKAGES = {"gguf": "gguf", "llama_cpp": "llama-cpp-python", "accelerate": "accelerate"}
"""Distribution of each module."""


def missing(*modules: str) -> str | None:
    """Returns a message about the first of these modules that is not installed; None if all are."""
    for module in modules:
        if find_spec(module) is None:
            return f"{PACKAGES[module]} is not installed; pip install vllm-adapmoe[peers]"
    return None


def need(module: str) -> Any:
    """Imports and returns a module.

    Raises:
        AdapMoEError: the module is not installed.
    """
    if (reason := missing(module)) is not None:
        raise AdapMoEError(reason)
    return import_module(module)
