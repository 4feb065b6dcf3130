"""Sets `moe_backend` in an engine's configuration, as `--moe-backend` does, or refuses before weights are loaded."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.compat import marlin_takes_mxfp4_with_quantised_activations
from vllm_adapmoe.integration.entry.backends import AUTO, INT8, INT_WEIGHTS, MXFP4_W4A4, choose_backend
from vllm_adapmoe.integration.entry.expert_format import expert_formats
from vllm_adapmoe.integration.model_info import expert_sizes, max_experts

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def set_moe_backend(config: AdapMoEConfig, vllm_config: VllmConfig) -> None:
    """Chooses a kernel that computes on slots, and sets `moe_backend` to it.

    Does so even if every expert may turn out to be resident: a monolithic kernel, which routes by itself, would hide
    the routing from gating, traces and calibration. A backend that the user set is kept if it makes no difference.

    Raises:
        AdapMoEError: vLLM has no such kernel for these experts on this device, or the user set another one.
    """
    kernel, quantisation = vllm_config.kernel_config, vllm_config.quant_config
    sizes = expert_sizes(vllm_config.model_config)
    if config.bits == 16:
        formats = expert_formats(quantisation, sizes, vllm_config.parallel_config.tensor_parallel_size)
    else:
        formats = {INT8 if config.bits == 8 else INT_WEIGHTS}
    if formats is None:
        assert quantisation is not None
        logger.warning(
            "moe_backend=%s: it is not known which kernels compute quantization=%s with part of the experts resident; "
            "vLLM's choice is checked after loading", kernel.moe_backend, quantisation.get_name(),
        )  # fmt: skip
        return
    if MXFP4_W4A4 in formats and not marlin_takes_mxfp4_with_quantised_activations():
        raise AdapMoEError(
            f"moe_backend={kernel.moe_backend}: this vLLM has no kernel that computes experts in {MXFP4_W4A4} with "
            "part of them resident; vLLM 0.32 and later have --moe-backend marlin"
        )
    device = current_platform.get_device_capability()
    capability = None if device is None else (device.major, device.minor)
    try:
        backend = choose_backend(formats, capability, kernel.moe_backend)
    except AdapMoEError as error:
        if _certainly_resident(config, vllm_config):
            logger.info("%s; kept, because every expert is resident", error)
            return
        raise
    if kernel.moe_backend == AUTO:
        logger.info(
            "Set moe_backend=%s: the kernel of vLLM that computes experts in %s with part of them resident",
            backend, " and ".join(sorted(formats)),
        )  # fmt: skip
        kernel.moe_backend = backend  # type: ignore[assignment]  # one of vLLM's names for it


def _certainly_resident(config: AdapMoEConfig, vllm_config: VllmConfig) -> bool:
    """Returns whether the budget holds every expert whatever its size, and nothing is gated or traced."""
    if config.gating.mode != "off" or config.trace_out is not None:
        return False
    if config.cache_fraction == 1.0:
        return True
    expert_bound = max_experts(vllm_config.model_config)
    return expert_bound is not None and config.cache_experts == expert_bound
