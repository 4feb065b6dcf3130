"""Switches the method on in a vLLM that has everything the method uses."""

from typing import Any

from vllm_adapmoe.integration.entry.one_line import print_errors_as_one_line
from vllm_adapmoe.integration.entry.version_check import check_version


def switch_on(engine_args: Any, vllm_config: Any) -> None:
    """Checks the vLLM version, then configures the engine for the method (`switch.switch_on`).

    Raises:
        AdapMoEError: this vLLM is not supported, or a setting or feature of the engine does not work with the method.
    """
    print_errors_as_one_line()
    check_version()
    from vllm_adapmoe.integration.entry import switch  # fails to import with a vLLM that is not supported

    switch.switch_on(engine_args, vllm_config)
