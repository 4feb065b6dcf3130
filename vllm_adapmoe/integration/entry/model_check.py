"""Refuses, before any weight is read, models and settings that cannot work, with the reason and the remedy."""

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import CpuArchEnum, current_platform

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.compat import old_ray_executor_chosen, runs_quantised_experts
from vllm_adapmoe.integration.loading.memory import usable_memory
from vllm_adapmoe.integration.loading.pack_store import check_store
from vllm_adapmoe.integration.model_info import DRAFTS_WITHOUT_MODEL, drafter_of, max_experts, mentions_experts
from vllm_adapmoe.planning.slot_budget import DeviceMemory, check_budget

LOAD_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "pt", "mistral", "npcache", "dummy", "runai_streamer"}
BITS = {"fp8": 8, "experts_int8": 8, "mxfp4": 4, "gpt_oss_mxfp4": 4}
"""Bits of one weight, for quantisations whose settings may omit them."""
DRAFTS = DRAFTS_WITHOUT_MODEL | {"draft_model", "eagle", "eagle3", "mtp"}
"""Methods of speculative decoding whose engines give the tokens of stock vLLM (`tests/integration/test_speculation.py`;
ngram_gpu and suffix run no model of their own)."""


def check_model(config: AdapMoEConfig, vllm_config: VllmConfig) -> None:
    """Checks the model, the vLLM features enabled with it, and the slot budget.

    Raises:
        AdapMoEError: names the first setting found that cannot work.
    """
    model = vllm_config.model_config
    if not mentions_experts(model):
        raise AdapMoEError(f"model={model.model!r} has no routed experts; remove moe_method")
    for is_set, setting, reason in feature_checks(vllm_config):
        if is_set:
            raise AdapMoEError(f"{setting} does not work with moe_method='adapmoe': {reason}")
    if current_platform.is_cpu():
        check_needs_no_gpu(config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if config.gating.mode == "batch" and ranks > 1:
        # What a rank drops would depend on its resident experts, so ranks would sum shards of different experts.
        raise AdapMoEError(
            f"gating.mode=batch does not work with tensor_parallel_size={ranks}: resident experts differ by rank; "
            "use gating.mode=token"
        )
    expert_bound = max_experts(model)
    if vllm_config.parallel_config.enable_expert_parallel and ranks > 1:
        expert_bound = (
            None if expert_bound is None else -(-model.get_num_experts() // ranks) * model.get_total_num_hidden_layers()
        )
        for is_set, setting, reason in (
            (config.trace_out is not None, f"trace_out={config.trace_out!r}",
             "a replay would need the experts of all ranks; record with tensor_parallel_size alone"),
            (config.allocation == "profile", "allocation='profile'",
             "a profile's curves are of whole layers; use pool, uniform or trace"),
        ):  # fmt: skip
            if is_set:
                raise AdapMoEError(f"{setting} does not work with enable_expert_parallel=True: {reason}")
    if config.precision not in (16, "auto"):
        check_precision(config.bits, vllm_config)
    check_budget(config, expert_bound, model.get_num_experts_per_tok() or 1, _device_memory(config, vllm_config))


def check_packs(config: AdapMoEConfig, vllm_config: VllmConfig) -> None:
    """Checks the store, whose packed files have the precision in their names (`pack_store.check_store`).

    Raises:
        AdapMoEError: as `check_store`.
    """
    # The number of experts is known only from the built model, but with fewer slots than one layer has experts a store
    # is certainly needed.
    experts = vllm_config.model_config.get_num_experts() or 0
    needed = (config.cache_fraction or 1) < 1 or (config.cache_experts or sys.maxsize) < experts
    check_store(config, vllm_config, needed)


def check_needs_no_gpu(config: AdapMoEConfig) -> None:
    """Refuses settings that have no meaning without a GPU.

    Raises:
        AdapMoEError: there is one.
    """
    if config.decode == "device":
        raise AdapMoEError("decode=device needs a GPU, which decides by itself; set decode=host")
    if config.host_gb is not None:
        raise AdapMoEError(
            f"host_gb={config.host_gb} does not work on the CPU, whose slots are in host memory already; raise "
            "cache_gb in its place"
        )


def check_precision(precision: int, vllm_config: VllmConfig) -> None:
    """Refuses to quantise experts that are quantised already, or that vLLM cannot compute here.

    Args:
        precision: 8 or 4.
        vllm_config: resolved by vLLM.

    Raises:
        AdapMoEError: they are.
    """
    model = vllm_config.model_config
    if model.quantization is not None:
        raise AdapMoEError(
            f"precision={precision} does not work with quantization={model.quantization!r}: the experts are "
            "quantised already; remove precision, or use the unquantised checkpoint"
        )
    # vLLM's x86 kernel for int8 has no float16 version for few rows (`tinygemm_kernel_vnni` of moe_int8.cpp, 0.32).
    dtypes = (torch.bfloat16,) if current_platform.is_cpu() else (torch.bfloat16, torch.float16)
    if model.dtype not in dtypes:
        raise AdapMoEError(
            f"precision={precision} does not work with dtype={str(model.dtype).removeprefix('torch.')}: vLLM's "
            "kernels do not take it; set dtype=bfloat16"
        )
    if precision == 4 and not current_platform.is_cpu():
        drafter = drafter_of(vllm_config)
        if drafter is not None and mentions_experts(drafter):
            raise AdapMoEError(
                f"precision=4 does not work with speculative_config model={drafter.model!r} on a GPU: "
                "moe_backend=marlin cannot compute its unquantised experts; set precision=8"
            )
        if getattr(envs, "VLLM_MARLIN_INPUT_DTYPE", None):
            raise AdapMoEError(
                f"precision=4 does not work with VLLM_MARLIN_INPUT_DTYPE={envs.VLLM_MARLIN_INPUT_DTYPE}: its scales "
                "may be negative; unset it"
            )
    x86 = current_platform.is_cpu() and current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if x86 and not runs_quantised_experts():
        raise AdapMoEError(
            f"precision={precision}: vLLM's x86 kernels for quantised experts need AMX, or AVX-512 with VNNI "
            "and bf16, which this CPU lacks; remove precision"
        )


def _device_memory(config: AdapMoEConfig, vllm_config: VllmConfig) -> DeviceMemory:
    """Returns the device memory known before the model is built; the worker adds what depends on the model."""
    if vllm_config.parallel_config.use_ray:  # workers run on other machines; this one may have no device
        return DeviceMemory(sys.maxsize)
    kv_cache = vllm_config.cache_config.kv_cache_memory_bytes
    return replace(usable_memory(config, vllm_config), kv_cache=kv_cache or 0, kv_cache_of="kv_cache_memory_bytes")


def feature_checks(vllm_config: VllmConfig) -> list[tuple[bool, str, str]]:
    """Returns, for each feature that does not work with slots: whether it is set, its name, and reason with remedy."""
    parallel, model, load = vllm_config.parallel_config, vllm_config.model_config, vllm_config.load_config
    offload, speculative = vllm_config.offload_config, vllm_config.speculative_config
    drafter = drafter_of(vllm_config)
    weights_move = "it moves weights that the expert cache moves already; remove it"
    return [
        (parallel.enable_eplb, "enable_eplb=True", "the slot map has no replicas of experts; remove it"),
        (parallel.enable_dbo, "enable_dbo=True", "two micro-batches would compete for the slots; remove it"),
        (parallel.ubatch_size > 1, f"ubatch_size={parallel.ubatch_size}",
         "micro-batches would compete for the slots; remove it"),
        (parallel.prefill_context_parallel_size > 1,
         f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}",
         "ranks gather each other's rows, padding between them; use tensor_parallel_size alone"),
        (parallel.enable_expert_parallel and not current_platform.is_cpu(), "enable_expert_parallel=True on a GPU",
         "its kernels read vLLM's expert map, which has no slots; use tensor_parallel_size alone"),
        (parallel.data_parallel_size > 1, f"data_parallel_size={parallel.data_parallel_size}",
         "data-parallel ranks exchange tokens between experts; run one engine per replica"),
        (parallel.pipeline_parallel_size > 1, f"pipeline_parallel_size={parallel.pipeline_parallel_size}",
         "packs, profiles and shares count the layers of the whole model; use tensor_parallel_size"),
        (parallel.use_ray and current_platform.is_cpu(), "distributed_executor_backend='ray'",
         "vLLM's Ray executor has no CPU workers; remove it, and scale with replicas (examples/ray_serve.md)"),
        (parallel.use_ray and old_ray_executor_chosen(), "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0",
         "the old Ray executor bypasses the worker, which would not see failed reads; unset it"),
        (current_platform.is_cuda() and envs.VLLM_USE_BREAKABLE_CUDAGRAPH, "VLLM_USE_BREAKABLE_CUDAGRAPH=1",
         "graphs would not be split where the host decides; set VLLM_USE_BREAKABLE_CUDAGRAPH=0, as vLLM enables it for "
         "some models"),
        (vllm_config.lora_config is not None, "enable_lora=True", "adapters of experts are not cached; remove it"),
        (getattr(model, "enable_sleep_mode", False), "enable_sleep_mode=True",
         "it discards weights, and so the slots' contents, without notifying the cache; remove it"),
        (offload.uva.cpu_offload_gb > 0, f"cpu_offload_gb={offload.uva.cpu_offload_gb}", weights_move),
        (offload.prefetch.offload_group_size > 0, f"offload_group_size={offload.prefetch.offload_group_size}",
         weights_move),
        (current_platform.is_zen_cpu() and os.environ.get("ZENDNNL_MATMUL_WEIGHT_CACHE") != "0",
         "zentorch with its cache of weights",
         "the cache is keyed by address, so it would compute with evicted experts; set ZENDNNL_MATMUL_WEIGHT_CACHE=0"),
        (load.load_format not in LOAD_FORMATS, f"load_format={load.load_format!r}",
         "it does not load expert by expert; use auto"),
        (speculative is not None and speculative.method not in DRAFTS,
         f"speculative_config method={getattr(speculative, 'method', None)!r}",
         f"it has not been compared with stock vLLM; use one of {', '.join(sorted(DRAFTS))}"),
        (parallel.enable_expert_parallel and drafter is not None and mentions_experts(drafter),
         f"speculative_config model={getattr(drafter, 'model', None)!r} with enable_expert_parallel=True",
         "vLLM's CPU kernels crash on the experts of other ranks, and a draft model's are vLLM's own; use "
         "tensor_parallel_size alone"),
    ]  # fmt: skip


def weight_bits(model: ModelConfig) -> int | None:
    """Returns the least bits that one expert weight may have, without scales; None if unknown.

    A lower bound: a quantisation may leave experts unquantised.
    """
    dtype: Any = model.dtype
    if model.quantization is None:
        return int(dtype.itemsize) * 8
    online = getattr(model.quantization_config, "moe", None)
    if online is not None:
        return 8 if online.weight.dtype in (torch.int8, torch.float8_e4m3fn) else None
    settings = getattr(model.hf_config, "quantization_config", None)
    if not isinstance(settings, dict):
        settings = {}
    if isinstance(settings.get("bits"), int):
        return settings["bits"]
    weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    return min((weight["num_bits"] for weight in weights if "num_bits" in weight), default=BITS.get(model.quantization))
