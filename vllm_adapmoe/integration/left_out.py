"""Detects that VLLM_PLUGINS leaves the plugin out: vLLM then runs none of our code that could report it."""

import os

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.compat import METHOD

REMEDY = f"add {METHOD} to it, or unset it"


def left_out() -> str | None:
    """Returns the setting that leaves the plugin out, or None. vLLM compares names exactly, spaces included."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or METHOD in allowed.split(","):
        return None
    return f"VLLM_PLUGINS={allowed} leaves the plugin out"


def check_not_left_out() -> None:
    """Checks that vLLM will load the plugin.

    Raises:
        AdapMoEError: VLLM_PLUGINS leaves it out.
    """
    reason = left_out()
    if reason is not None:
        raise AdapMoEError(f"{reason}; {REMEDY}")
