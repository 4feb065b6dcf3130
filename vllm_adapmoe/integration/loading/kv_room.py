"""Shrinks the slots if, by vLLM's own measurement, the KV cache of one request does not fit in addition to them."""

from typing import Any

import torch
import torch.distributed as dist
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.loading.expert_loading import ExpertLoading
from vllm_adapmoe.integration.loading.memory import min_kv_cache
from vllm_adapmoe.units import GiB

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def room_for_kv_cache(
    config: AdapMoEConfig,
    vllm_config: VllmConfig,
    loading: ExpertLoading,
    cache: ExpertCacheManager | None,
    available: int,
) -> int:
    """Returns the bytes for vLLM's KV cache: `available`, plus those of slots released for it.

    With `cache_gb=auto` the slots took what estimates of activations and CUDA graphs left. vLLM measures both
    (`determine_available_memory`), and would refuse to start if its KV cache could not hold one request. Every rank
    must call this.

    Raises:
        AdapMoEError: slots would have to shrink and the budget is not `auto`, or too few would be left.
    """
    model: Any = vllm_config.model_config
    if vllm_config.cache_config.kv_cache_memory_bytes is not None or model.original_max_model_len == -1:
        return available  # the size is set explicitly, or max_model_len adapts to what fits
    needed, purpose = min_kv_cache(vllm_config)
    missing = _max_over_ranks(needed - available)
    if missing <= 0:
        return available
    available_gb = max(0, available) / GiB
    measured = f"vLLM has measured {available_gb:.3f} GiB for a KV cache that takes {needed / GiB:.3f} for {purpose}"
    if not config.automatic or cache is None:
        slot_bytes = loading.pools.expert_bytes if cache is None else sum(pool.nbytes for pool in cache.pools)
        max_gb = max(0, slot_bytes - missing) * 1000 // GiB / 1000
        raise AdapMoEError(f"{measured}; set at most cache_gb={max_gb:.3f}, or {loading.pools.memory.remedy}")
    freed = loading.shrink_slots(cache, missing)
    logger.info("Expert cache: %s; released %.3f GiB of slots, %d slots remain", measured, freed / GiB, cache.num_slots)
    return available + freed


def _max_over_ranks(nbytes: int) -> int:
    """Returns the maximum over all ranks, which must have equally many slots."""
    group = get_tp_group()
    if group.world_size == 1:
        return nbytes
    maximum = torch.tensor(nbytes, dtype=torch.int64)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group.cpu_group)
    return int(maximum)
