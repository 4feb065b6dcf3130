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
GATING = "adapmoe_gating"
LOADS = "adapmoe_expected_loads"
HEADS = "adapmoe_heads"
PROFILED = "adapmoe_profiled"
"""Keys of `VllmConfig.additional_config`, which the front end writes (`switch`) and every process reads."""

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
REBOUND = {
    f"{FUSED_MOE}.experts.triton_moe.TritonExperts.apply": {"_prepare_expert_assignment", "try_get_optimal_moe_config"},
    f"{FUSED_MOE}.experts.triton_moe.TritonWNA16Experts.apply": {"moe_align_block_size", "try_get_optimal_moe_config"},
    f"{FUSED_MOE}.experts.marlin_moe.MarlinExperts.apply": {"fused_marlin_moe"},
    f"{FUSED_MOE}.experts.marlin_moe.fused_marlin_moe": {"moe_align_block_size", "math"},
    f"{FUSED_MOE}.fused_moe._prepare_expert_assignment": {"moe_align_block_size"},
}
"""vLLM functions that `slot_kernels` runs with some global names rebound, and the names that they must use."""


def adapmoe_settings(vllm_config: Any) -> Any:
    """Returns the user's configuration, `AdapMoEConfig.transport`; None if the method is off."""
    return _setting(vllm_config, METHOD)


def profiled_settings(vllm_config: Any) -> Any:
    """Returns the model that the profile is of; None without a profile."""
    return _setting(vllm_config, PROFILED)


def gating_settings(vllm_config: Any) -> Any:
    """Returns the front end's `GatingPlan` as a dict; None without gating."""
    return _setting(vllm_config, GATING)


def expected_loads_settings(vllm_config: Any) -> Any:
    """Returns each layer's expected loads by number of slots; None unless `allocation=profile`."""
    return _setting(vllm_config, LOADS)


def heads_settings(vllm_config: Any) -> Any:
    """Returns path, hash and shape of the next-token heads; None without."""
    return _setting(vllm_config, HEADS)


def _setting(vllm_config: Any, key: str) -> Any:
    additional = getattr(vllm_config, "additional_config", None)  # called with any vLLM version
    return additional.get(key) if isinstance(additional, dict) else None


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
        there = [(name, batch.num_computed_tokens_cpu[i]) for i, name in enumerate(batch.req_ids) if name in scheduled]
        names, computed = [name for name, _ in there], [count for _, count in there]
    return [(name, int(count), scheduled[name]) for name, count in zip(names, computed, strict=True)]


def marlin_takes_mxfp4_with_quantised_activations() -> bool:
    """Returns whether Marlin may be set for MXFP4 experts whose checkpoint also quantises activations (since 0.32)."""
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    return hasattr(mxfp4, "_warn_on_bf16_fallback")
