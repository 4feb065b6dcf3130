"""Where vLLM finds us. While its own import is under way nothing here imports it."""

from typing import Any


def announce() -> None:
    """Platform plugin that offers no platform: it is asked in time to add the `moe_method` argument.

    General plugins load when `EngineArgs` is made, too late for `LLM(moe_method=...)` and for the command line.
    """
    from vllm_adapmoe.integration.entry.edits import install_edits

    install_edits()


def register() -> None:
    """General plugin: the same for processes where no platform plugin is asked (`VLLM_TARGET_DEVICE=cpu`)."""
    announce()


def switch_on(engine_args: Any, vllm_config: Any) -> None:
    """Configures the engine for the method (`switch.switch_on`), if this vLLM is one that it works with.

    Raises:
        AdapMoEError: it is not, or a setting or feature of the engine does not go with the method.
    """
    from vllm_adapmoe.integration.entry.one_line import print_errors_as_one_line
    from vllm_adapmoe.integration.entry.version_check import check_version

    print_errors_as_one_line()
    check_version()
    from vllm_adapmoe.integration.entry import switch

    switch.switch_on(engine_args, vllm_config)
