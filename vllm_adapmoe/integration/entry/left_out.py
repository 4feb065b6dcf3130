"""Whether vLLM was told to leave the plugin out: then nothing of ours runs in it, and nobody there can say so."""

import os

from vllm_adapmoe.config import AdapMoEError

NAME = "adapmoe"
"""Of every entry point of ours."""
REMEDY = f"add {NAME} to it, or unset it"


def left_out() -> str | None:
    """What leaves the plugin out; None: nothing does. VLLM compares names as they stand between two commas."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or NAME in allowed.split(","):
        return None
    return f"VLLM_PLUGINS={allowed} leaves the plugin out"


def check_not_left_out() -> None:
    """Refuses what would need the plugin.

    Raises:
        AdapMoEError: vLLM was told to leave it out.
    """
    reason = left_out()
    if reason is not None:
        raise AdapMoEError(f"{reason}; {REMEDY}")
