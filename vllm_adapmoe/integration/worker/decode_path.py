"""Chooses whether the GPU or the host decides in decode steps which experts to load and whom to evict."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.device import MAX_EXPERTS, MAX_TOP_K
from vllm_adapmoe.device.decode import DeviceDecode, max_tokens
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts
from vllm_adapmoe.store.page_lock import kernels_read_page_locked

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def choose_decode(
    config: AdapMoEConfig,
    vllm_config: VllmConfig,
    layers: Sequence[MappedExperts],
    cache: ExpertCacheManager,
    device: torch.device,
) -> DeviceDecode | None:
    """Returns what decides on the GPU in decode steps; None if the host decides.

    Raises:
        AdapMoEError: `decode=device` is set, but the model, the store or the machine does not support it.
    """
    if config.decode == "host":
        return None
    # An obstacle on one rank applies to all, because their graphs contain the same collectives.
    obstacle = _of_any_rank(_obstacle(config, vllm_config, layers, cache, device))
    if obstacle is not None:
        if config.decode == "device":
            raise AdapMoEError(f"decode=device does not work here: {obstacle}; set decode=host")
        logger.info("Expert cache: the host decides in decode steps: %s", obstacle)
        return None
    prefetch = config.prefetch
    decode = DeviceDecode(
        cache, max(layer.top_k for layer in layers), prefetch.max_experts if prefetch.lookahead else 0, device
    )
    logger.info("Expert cache: the GPU decides in steps of up to %d tokens", decode.max_tokens)
    return decode


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
    if config.allocation == "trace":
        return "allocation=trace revises the minimum slots of the layers on the host"
    if config.link_gbps is not None:
        return "link_gbps limits fetches of the host, not those of the GPU"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "kv_sharing_fast_prefill gives later layers fewer rows than earlier ones"
    if vllm_config.parallel_config.enable_expert_parallel:
        return "with expert parallelism a rank has only a part of the experts"
    top_k, experts = (max(getattr(layer, name) for layer in layers) for name in ("top_k", "local_num_experts"))
    if top_k > MAX_TOP_K or experts > MAX_EXPERTS:
        return f"the model has {experts} experts and uses {top_k}, of at most {MAX_EXPERTS} and {MAX_TOP_K}"
    if any(cache.store.page_locked((layer.cache_layer, 0)) is None for layer in layers):
        return "the experts are not all in page-locked host memory"
    if device.type == "cuda" and not kernels_read_page_locked():
        return "this GPU cannot read host memory by the host's addresses"
    if not max_tokens(cache, top_k):
        return f"{cache.num_slots} slots are too few for the {top_k} experts of one token"
    return None
