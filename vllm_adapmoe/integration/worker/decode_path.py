"""Chooses whether decode steps fetch absent experts or read them in place, as configured or measured."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.device.decode_timing import time_decode
from vllm_adapmoe.device.in_place import InPlaceDecode
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts, in_place_obstacle
from vllm_adapmoe.store.page_lock import readable_in_place

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def choose_decode(
    config: AdapMoEConfig,
    vllm_config: VllmConfig,
    layers: Sequence[MappedExperts],
    cache: ExpertCacheManager,
    device: torch.device,
) -> InPlaceDecode | None:
    """Returns `InPlaceDecode` if decode steps are to read absent experts in host memory; None if they fetch them.

    Raises:
        AdapMoEError: `decode=in_place` is set, but the model, the store or the machine does not support it.
    """
    if config.decode == "fetch":
        return None
    # An obstacle on one rank applies to all, because their graphs contain the same collectives.
    obstacle = _of_any_rank(_obstacle(config, vllm_config, layers, cache, device))
    if obstacle is not None:
        if config.decode == "in_place":
            raise AdapMoEError(f"decode=in_place does not work here: {obstacle}; set decode=fetch")
        logger.info("Expert cache: decode steps fetch absent experts: %s", obstacle)
        return None
    top_k = max(layer.top_k for layer in layers)
    in_place = InPlaceDecode(cache, top_k, device)
    if config.decode == "in_place":
        return in_place
    experts = sum(cache.store.num_experts(layer) for layer in range(cache.store.num_layers))
    misses = top_k * (1 - cache.num_slots / experts)
    dtype: Any = vllm_config.model_config.dtype
    times = time_decode(cache, in_place, top_k, dtype)
    cache.restart(cache.controller.empty_copy(), config.link_gbps)
    fetch, read = times.at(misses)
    faster = get_tp_group().broadcast_object(read < fetch)
    logger.info(
        "Expert cache: decode steps %s absent experts: with %.1f of %d absent, a layer took %.3f ms in place, "
        "%.3f ms when they were fetched first",
        "read" if faster else "fetch", misses, top_k, 1e3 * read, 1e3 * fetch,
    )  # fmt: skip
    return in_place if faster else None


def _of_any_rank(obstacle: str | None) -> str | None:
    """Returns the obstacle of the first rank that has one; None if none has."""
    group = get_tp_group()
    if group.world_size == 1:
        return obstacle
    obstacles: list[str | None] = [None] * group.world_size
    dist.all_gather_object(obstacles, obstacle, group=group.cpu_group)
    return next((obstacle for obstacle in obstacles if obstacle is not None), None)


def _obstacle(
    config: AdapMoEConfig,
    vllm_config: VllmConfig,
    layers: Sequence[MappedExperts],
    cache: ExpertCacheManager,
    device: torch.device,
) -> str | None:
    if config.gating.mode == "batch":
        return "gating.mode=batch needs to know on the host which experts are resident"
    if config.trace_out is not None:
        return "trace_out records routing on the host"
    if config.link_gbps is not None:
        return "link_gbps limits fetches, not reads in place"
    if vllm_config.parallel_config.enable_expert_parallel:
        return "with expert parallelism a rank has only a part of the experts"
    if device.type == "cuda" and not readable_in_place():
        return "this GPU cannot read host memory by the host's addresses"
    for layer in layers:
        if (reason := in_place_obstacle(layer, cache)) is not None:
            return f"{layer.layer_name}: {reason}"
    return None
