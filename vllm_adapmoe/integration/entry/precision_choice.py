"""Resolves `precision: auto` in the front end, so that every process and every file's name has the number."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.entry.model_check import check_precision
from vllm_adapmoe.integration.loading.drafter import estimate_drafter
from vllm_adapmoe.integration.loading.graph_memory import captured_graphs
from vllm_adapmoe.integration.loading.memory import step_bytes, usable_memory
from vllm_adapmoe.integration.loading.model_files import config_folder
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint, measure_step
from vllm_adapmoe.planning.graph_memory import graph_bytes
from vllm_adapmoe.planning.memory_plan import CONTEXT_BYTES, ModelSize
from vllm_adapmoe.planning.precision_choice import choose_precision
from vllm_adapmoe.planning.slot_budget import token_bytes
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

PROCESS_BYTES = 768 << 20
"""Memory of a CPU worker before it builds a model: imported modules, 0.71 GiB with vLLM 0.32."""


def resolve_precision(config: AdapMoEConfig, vllm_config: VllmConfig, profile: ModelProfile | None) -> AdapMoEConfig:
    """Returns the configuration with a number in place of `precision: auto`, chosen by memory and profile.

    Raises:
        AdapMoEError: the model cannot be sized, its memory is not known here, or the profile lacks a cost.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.use_ray and config.automatic:
        raise AdapMoEError(
            "precision=auto with cache_gb=auto does not work with distributed_executor_backend='ray': the memory of "
            "its workers is not known here; set cache_gb or precision"
        )
    fewer, problem = [], ""
    for precision in (8, 4):
        try:
            check_precision(precision, vllm_config)
        except AdapMoEError as error:
            problem = str(error).partition(";")[0]
        else:
            fewer.append(precision)
    if not fewer:
        logger.info("precision=auto: 16 bits, for %s", problem)
        return config.model_copy(update={"precision": 16})
    folder = config_folder(model.model, model.revision)
    try:
        sizes = {16: _size(folder, vllm_config, 16)}
    except AdapMoEError as error:
        reason = str(error).partition(";")[0]
        raise AdapMoEError(f"precision=auto does not work here: {reason}; set precision to 16, 8 or 4") from None
    for precision in fewer:
        with suppress(AdapMoEError):  # no kernel takes experts of this size
            sizes[precision] = _size(folder, vllm_config, precision)
    room = _room(config, vllm_config, folder, sizes[16])
    chosen, reason = choose_precision(sizes, room, profile, config.gating.max_loss_increase)
    logger.info("precision=auto: %d bits: %s", chosen, reason)
    return config.model_copy(update={"precision": chosen})


def _size(folder: Path, vllm_config: VllmConfig, precision: int) -> ModelSize:
    """Returns the sizes of one rank's part of the model.

    Raises:
        AdapMoEError: the model cannot be sized, or no kernel takes experts of this size at this precision.
    """
    dtype, ranks = cast(Any, vllm_config.model_config.dtype), vllm_config.parallel_config.tensor_parallel_size
    whole = vllm_config.parallel_config.enable_expert_parallel  # a rank has a part of the experts, not of each
    parts = 1 if whole else ranks
    _, size = measure_checkpoint(folder, dtype, None, precision, current_platform.is_cpu(), parts)
    experts = -(-size.num_experts // ranks) if whole else size.num_experts
    return replace(size, num_experts=experts, other_bytes=-(-size.other_bytes // ranks))


def _room(config: AdapMoEConfig, vllm_config: VllmConfig, folder: Path, size: ModelSize) -> int:
    """Returns the bytes for slots of one worker; with `cache_gb: auto` estimated as if every expert were resident.

    The worker counts them when the model is built.
    """
    if config.cache_gb != "auto":
        return int(config.cache_gb * GiB)
    dtype, ranks = cast(Any, vllm_config.model_config.dtype), vllm_config.parallel_config.tensor_parallel_size
    step = measure_step(folder, dtype, vllm_config.model_config.max_model_len)
    inner = step.inner // ranks
    row, pair = step.hidden * dtype.itemsize, token_bytes(step.hidden, inner, size.top_k, dtype.itemsize)
    graphs = captured_graphs(
        EngineSettings(config=config), vllm_config, size.num_layers, size.all_layers, resident=True
    )
    layer_bytes = size.num_experts * size.expert_bytes + size.other_bytes // size.all_layers
    kv_cache = vllm_config.cache_config.kv_cache_memory_bytes
    memory = replace(
        usable_memory(config, vllm_config),
        in_use=PROCESS_BYTES if current_platform.is_cpu() else CONTEXT_BYTES,
        other_weights=size.other_bytes,
        draft_model=estimate_drafter(vllm_config, layer_bytes),
        activations=step_bytes(vllm_config, inner, size.top_k),
        kv_cache=step.kv_bytes * step.length if kv_cache is None else kv_cache,  # some models' is whole on each rank
        graphs=max((graph_bytes(each, row_bytes=row, pair_bytes=pair) for each in graphs), default=0),
    )
    return max(0, memory.left)
