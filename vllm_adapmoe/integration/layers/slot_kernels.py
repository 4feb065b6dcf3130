"""Runs vLLM's expert kernels on a pool of slots: pairs are sorted by expert, and blocks mapped to slots."""

from collections.abc import Callable, Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size


def takes_slots(experts: object) -> bool:
    """Returns whether `run_on_slots` supports a kernel's class.

    Other classes do not skip absent experts, or sort pairs by other means.
    """
    return type(experts) in _BINDINGS


def run_on_slots(experts: FusedMoEExpertsModular, num_experts: int) -> None:
    """Makes a kernel instance read weights `[slots, ...]` through a map `[num_experts + 1]`.

    vLLM's `moe_align_block_size` counts pairs by the *mapped* id, in a histogram with one bin per expert (fewer than
    1024), so slot numbers do not fit (csrc/moe/moe_align_sum_kernels.cu, `get_local_expert_id`). The kernels themselves
    only need a weight row for each block. So `apply` of this instance runs vLLM's own code, with the calls that sort
    pairs and choose tiles redirected to the functions below.

    Args:
        experts: a kernel that `takes_slots`.
        num_experts: number of experts of the layer. `apply` must be given `expert_map`, int32 `[num_experts + 1]`: the
            row of each expert, -1 if absent, and a final -1 for the id `num_experts`, which dropped pairs have, and
            those of absent experts.
    """
    names = _BINDINGS[type(experts)](num_experts)
    experts.apply = _rebound(type(experts).apply, names).__get__(experts)  # type: ignore[method-assign]


def align_on_slots(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replaces `moe_align_block_size` for a map to slots: sorts by expert, then maps the expert of each block.

    Args:
        topk_ids: integer `[tokens, top_k]`, from 0 to the number of experts, inclusive: the latter if the expert is
            absent, or the pair dropped.
        block_size: rows of a block.
        num_experts: the caller's count; used only without `expert_map`.
        expert_map: as in `run_on_slots`; None: ids are weight rows already.
        pad_sorted_ids: as in `moe_align_block_size`.
        ignore_invalid_experts: if set, dropped pairs get no block, and their rows are never written. Otherwise they get
            blocks of row -1, for which kernels write zeros.
    """
    if expert_map is None:
        return moe_align_block_size(topk_ids, block_size, num_experts, None, pad_sorted_ids)
    absent = expert_map.numel() - 1
    bins = absent if ignore_invalid_experts else absent + 1  # an id beyond the bins is not sorted
    sorted_ids, blocks, padded = moe_align_block_size(topk_ids, block_size, bins, None, pad_sorted_ids)
    return sorted_ids, expert_map[blocks], padded  # -1, behind the last block, is the end of the map: -1 again


def _assign_on_slots(num_experts: int) -> Callable[..., Any]:
    """Returns a replacement of `_prepare_expert_assignment` for a map to slots.

    vLLM does not sort the pairs of small steps: each pair is a block. It does so without a map only, so its code is
    asked without one, and the map applied to the blocks.
    """
    prepare = triton_moe._prepare_expert_assignment
    without_sorting = _rebound(prepare, {"moe_align_block_size": lambda *_, **__: None})
    with_sorting = _rebound(prepare, {"moe_align_block_size": align_on_slots})

    def assign(
        ids: torch.Tensor, config: Any, tokens: int, top_k: int, count: int, expert_map: Any, **flags: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        if expert_map is not None:
            assigned = without_sorting(ids, config, tokens, top_k, num_experts, None, **flags)
            if assigned is not None:
                unsorted, experts, padded = assigned
                return unsorted, expert_map.index_select(0, experts), padded
        return with_sorting(ids, config, tokens, top_k, count, expert_map, **flags)

    return assign


def _triton(num_experts: int) -> dict[str, Any]:
    assign = _assign_on_slots(num_experts)
    return {"_prepare_expert_assignment": assign, "try_get_optimal_moe_config": _tiles_for(num_experts)}


def _triton_wna16(num_experts: int) -> dict[str, Any]:
    return {"moe_align_block_size": align_on_slots, "try_get_optimal_moe_config": _tiles_for(num_experts)}


def _tiles_for(num_experts: int) -> Callable[..., dict[str, int]]:
    choose = triton_moe.try_get_optimal_moe_config

    def choose_tiles(w1_shape: tuple[int, ...], w2_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> dict[str, int]:
        # Tuned tiles are looked up by the number of experts that share the tokens, not by the number of slots.
        return choose((num_experts, *w1_shape[1:]), (num_experts, *w2_shape[1:]), *args, **kwargs)

    return choose_tiles


def _marlin(num_experts: int) -> dict[str, Any]:
    # Marlin sizes blocks by the tokens per expert: ceil(tokens * slots / experts) * top_k / slots. Rounding would make
    # the size, and so Marlin's order of summation, depend on the number of slots.
    exact = SimpleNamespace(ceil=lambda tokens: tokens)
    names = {"moe_align_block_size": align_on_slots, "math": exact}
    return {"fused_marlin_moe": _rebound(marlin_moe.fused_marlin_moe, names)}


_BINDINGS: dict[type, Callable[[int], dict[str, Any]]] = {
    triton_moe.TritonExperts: _triton,
    triton_moe.TritonWNA16Experts: _triton_wna16,
    marlin_moe.MarlinExperts: _marlin,
}


KERNELS = frozenset(cls.__name__ for cls in _BINDINGS)
"""Names of the kernel classes that `run_on_slots` supports."""


def _rebound(function: Any, names: Mapping[str, Any]) -> FunctionType:
    """Returns a copy of a function with some global names rebound; the original is unchanged.

    Raises:
        AttributeError: the function does not use such a name, so vLLM's code has changed.
    """
    module = function.__globals__
    for name in names:
        if name not in module or name not in function.__code__.co_names:
            raise AttributeError(f"{function.__module__}.{function.__qualname__} does not use {name}")
    globals_ = {**module, **names}
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    return copy
