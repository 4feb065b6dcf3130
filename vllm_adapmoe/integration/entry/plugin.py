"""The entry points that vLLM calls. Importing this module imports no vLLM, whose own import may be in progress."""

from typing import Any


def announce() -> None:
    """Installs the edits of vLLM; as a platform plugin that offers no platform, it runs early enough for `moe_method`.

    General plugins load when `EngineArgs` is created, too late for `LLM(moe_method=...)` and for the command line.
    """
    from vllm_adapmoe.integration.entry.edits import install_edits

    install_edits()


def register() -> None:
    """Does the same as a general plugin, for processes that load no platform plugins (`VLLM_TARGET_DEVICE=cpu`)."""
    announce()


def switch_on(engine_args: Any, vllm_config: Any) -> None:
    """Configures the engine for the method (`checked_switch.switch_on`)."""
    from vllm_adapmoe.integration.entry import checked_switch

    checked_switch.switch_on(engine_args, vllm_config)
