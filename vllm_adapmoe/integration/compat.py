"""Hides the differences between supported vLLM versions, by detecting features instead of comparing versions.

This file is imported with any vLLM, even with the method off, so functions import vLLM only when called. Changes that
no registration can make are in `edits.py`; the errors for unsupported versions in `version_check.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

OLDEST, NEWEST = "0.30", "0.33"
"""Oldest and newest supported vLLM releases, patch releases included."""

METHOD = "adapmoe"
"""Name of the MoE method and of our entry points, and key of the user's configuration in `additional_config`."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Shim:
    """A workaround that only older supported versions need; a test fails once `OLDEST` no longer needs it."""

    name: str
    before: str
    """First release that no longer needs the shim."""
    old: str
    """Dotted name in vLLM that exists before that release and no longer from it on."""


SHIMS: list[Shim] = []


def needed_before(release: str, old: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Registers the decorated function of this file as a `Shim`."""

    def declare(function: Callable[P, T]) -> Callable[P, T]:
        SHIMS.append(Shim(function.__name__, release, old))
        return function

    return declare


@needed_before("0.33", old="vllm.v1.core.kv_cache_utils.max_memory_usage_bytes")
def kv_cache_counting() -> tuple[Callable[..., int], Callable[..., None]]:
    """Returns `max_memory_usage_bytes` and `unify_hybrid_kv_cache_specs`, which 0.33 moved."""
    try:
        from vllm.v1.core.kv_cache_planning import max_memory_usage_bytes, unify_hybrid_kv_cache_specs
    except ImportError:
        from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes, unify_hybrid_kv_cache_specs
    return max_memory_usage_bytes, unify_hybrid_kv_cache_specs


@needed_before("0.33", old="vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
def old_ray_executor_chosen() -> bool:
    """Returns whether Ray workers would run under vLLM's old executor, which 0.33 removed."""
    from vllm import envs

    return not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)


FUSED_MOE = "vllm.model_executor.layers.fused_moe"
CPU_MOE = f"{FUSED_MOE}.experts.cpu_moe"
QUANTISED_ON_CPU = ("CPUExpertsInt8", "CPUExpertsInt4", "CPUExpertsFp8", "CPUExpertsMxfp4")
"""Kernels of `CPU_MOE` for quantised experts on x86. vLLM offers them only where there is AMX, but they compute with
AVX-512 as well (`csrc/cpu/sgl-kernels/moe_int8.cpp`, `moe_int4.cpp`, `moe_fp8.cpp` of 0.32). Each lists some routing
methods, but is given what vLLM's router has chosen, like the kernel for unquantised experts."""
EDITED = {
    "vllm.engine.arg_utils": (
        "EngineArgs.__dataclass_fields__",
        "EngineArgs.add_cli_args",
        "EngineArgs.create_engine_config",
        "AsyncEngineArgs.__dataclass_fields__",
    ),
    "vllm.v1.metrics.stats": ("SchedulerStats.__dataclass_fields__",),
    CPU_MOE: tuple(
        f"{kernel}.{check}"
        for kernel in QUANTISED_ON_CPU
        for check in ("_supports_current_device", "_supports_routing_method")
    ),
}
"""Names that each module edited by `entry/edits.py` must have; without them it is left unedited."""
REBOUND = {
    f"{FUSED_MOE}.experts.triton_moe.TritonExperts.apply": {"_prepare_expert_assignment", "try_get_optimal_moe_config"},
    f"{FUSED_MOE}.experts.triton_moe.TritonWNA16Experts.apply": {"moe_align_block_size", "try_get_optimal_moe_config"},
    f"{FUSED_MOE}.experts.marlin_moe.MarlinExperts.apply": {"fused_marlin_moe"},
    f"{FUSED_MOE}.experts.marlin_moe.fused_marlin_moe": {"moe_align_block_size", "math"},
    f"{FUSED_MOE}.fused_moe._prepare_expert_assignment": {"moe_align_block_size"},
}
"""vLLM functions that `slot_kernels` runs with some global names rebound, and the names that they must use."""


def runs_quantised_experts() -> bool:
    """Returns whether this is an x86 CPU that runs the kernels of `QUANTISED_ON_CPU`."""
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return False
    avx512 = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
    return torch.cpu._is_amx_tile_supported() or avx512


def routes_for_quantised_experts(routing_method: Any, *_: Any) -> bool:
    """Returns whether the kernels of `QUANTISED_ON_CPU` compute what a router of this kind chooses.

    They do not take router weights on the experts' input, which is where Llama 4 has them.
    """
    return routing_method.name != "Llama4"


def is_switched_on(vllm_config: Any) -> bool:
    """Returns whether an engine uses the method; works with the configuration of any vLLM version."""
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, dict) and METHOD in additional


def requests_of_step(runner: Any, scheduler_output: Any) -> list[tuple[str, int, int]]:
    """Returns id, first position and number of rows of each request in the current step, in row order."""
    scheduled = scheduler_output.num_scheduled_tokens
    if hasattr(runner, "req_states"):  # model runner V2, which does not expose its batch while the model runs
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        names = sort_batch_req_ids(scheduled, scheduler_output.scheduled_spec_decode_tokens, runner.decode_query_len)
        states = runner.req_states
        computed = [states.num_computed_tokens_np[states.req_id_to_index[name]] for name in names]
    else:
        batch = runner.input_batch
        rows = [(name, batch.num_computed_tokens_cpu[i]) for i, name in enumerate(batch.req_ids) if name in scheduled]
        names, computed = [name for name, _ in rows], [count for _, count in rows]
    return [(name, int(count), scheduled[name]) for name, count in zip(names, computed, strict=True)]


def marlin_takes_mxfp4_with_quantised_activations() -> bool:
    """Returns whether Marlin may be set for MXFP4 experts whose checkpoint also quantises activations (since 0.32)."""
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    return hasattr(mxfp4, "_warn_on_bf16_fallback")
