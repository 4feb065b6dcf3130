"""What the peers need beside the plugin's own dependencies; missing, it is one line."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllm_adapmoe.config import AdapMoEError

PACKAGES = {"gguf": "gguf", "llama_cpp": "llama-cpp-python", "accelerate": "accelerate"}
"""Modules, and the distributions that have them."""


def missing(*modules: str) -> str | None:
    """What to say of the first of these modules that is not installed; None if all are."""
    for module in modules:
        if find_spec(module) is None:
            return f"{PACKAGES[module]} is not installed; pip install vllm-adapmoe[peers]"
    return None


def need(module: str) -> Any:
    """The module, imported.

    Raises:
        AdapMoEError: it is not installed.
    """
    if (reason := missing(module)) is not None:
        raise AdapMoEError(reason)
    return import_module(module)
