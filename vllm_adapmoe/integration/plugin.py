"""Where vLLM finds us. Nothing here imports vLLM: its own import is still under way."""


def announce() -> None:
    """Platform plugin that offers no platform: it is asked in time to add the `moe_method` argument.

    General plugins load when `EngineArgs` is made, too late for `LLM(moe_method=...)` and for the command line.
    """
    from vllm_adapmoe.integration.compat import install_edits

    install_edits()


def register() -> None:
    """General plugin: the same for processes where no platform plugin is asked (`VLLM_TARGET_DEVICE=cpu`)."""
    announce()
