"""Grouped SwiGLU kernel of the check, on pools of slots and a map from expert to slot.

It stands in for vLLM's kernels, in the check alone: the check has to run where vLLM is not installed. Like them it
finds an expert's weights by its slot, in a map that is read when the kernel runs, and an expert without a slot adds
nothing.

Grouping needs no kernel of its own: every pair of token and expert starts a row of programs, and only that of an
expert's first pair continues, with all pairs of that expert. So each weight is read once for all tokens that use it.
"""

import torch
import triton
import triton.language as tl

from vllm_adapmoe.device import MAX_TOKENS

BLOCK_N, BLOCK_K = 32, 128
"""Tile of the weights: `BLOCK_K` consecutive values are read at a time, 256 bytes of bf16."""


@triton.jit
def _rows_of_first_pair(ids, row_of, pairs, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """Returns the slot of this pair's expert, -1 if it has none or another program computes it, and the expert's pairs
    `[ROWS]`, padded by `pairs`."""
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    index = tl.arange(0, PAIRS)
    same = tl.load(ids + index, mask=index < pairs, other=-1) == expert
    first = tl.min(tl.where(same, index, PAIRS))
    position = tl.cumsum(same.to(tl.int32), 0) - 1
    row = tl.arange(0, ROWS)
    is_row = same[None, :] & (position[None, :] == row[:, None])
    rows = tl.min(tl.where(is_row, index[None, :], pairs), axis=1)
    slot = tl.load(row_of + tl.maximum(expert, 0))
    return tl.where((first == pair) & (expert >= 0), slot, -1), rows


# Not specialised on the number of pairs, which changes from step to step and would recompile the kernel.
@triton.jit(do_not_specialize=["pairs"])
def _gate_and_up(
    x, ids, row_of, weights, out,
    pairs, hidden, inner, top_k, stride_x, slot_stride,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot, rows = _rows_of_first_pair(ids, row_of, pairs, PAIRS, ROWS)
    if slot < 0:
        return
    weight = weights + slot.to(tl.int64) * slot_stride
    row_mask = rows < pairs
    token = tl.where(row_mask, rows, 0) // top_k
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    gate = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    half = inner.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_K):
        k_mask = (start + k) < hidden
        a = tl.load(
            x + token[:, None].to(tl.int64) * stride_x + (start + k)[None, :],
            mask=row_mask[:, None] & k_mask[None, :], other=0.0,
        )  # fmt: skip
        offsets = n[:, None].to(tl.int64) * hidden + (start + k)[None, :]
        weight_mask = (n < inner)[:, None] & k_mask[None, :]
        gate += tl.dot(a, tl.trans(tl.load(weight + offsets, mask=weight_mask, other=0.0)))
        up += tl.dot(a, tl.trans(tl.load(weight + half + offsets, mask=weight_mask, other=0.0)))
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    pointers = out + rows[:, None].to(tl.int64) * inner + n[None, :]
    tl.store(pointers, value, mask=row_mask[:, None] & (n < inner)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def _down(
    activated, ids, row_of, weights, out,
    pairs, hidden, inner, slot_stride,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot, rows = _rows_of_first_pair(ids, row_of, pairs, PAIRS, ROWS)
    if slot < 0:
        return
    weight = weights + slot.to(tl.int64) * slot_stride
    row_mask = rows < pairs
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k_mask = (start + k) < inner
        a = tl.load(
            activated + rows[:, None].to(tl.int64) * inner + (start + k)[None, :],
            mask=row_mask[:, None] & k_mask[None, :], other=0.0,
        )  # fmt: skip
        offsets = n[:, None].to(tl.int64) * inner + (start + k)[None, :]
        weight_mask = (n < hidden)[:, None] & k_mask[None, :]
        total += tl.dot(a, tl.trans(tl.load(weight + offsets, mask=weight_mask, other=0.0)))
    pointers = out + rows[:, None].to(tl.int64) * hidden + n[None, :]
    tl.store(pointers, total, mask=row_mask[:, None] & (n < hidden)[None, :])


@triton.jit
def _combine(outputs, ids, row_of, weights, out, hidden, top_k, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        expert = tl.load(ids + pair)
        absent = (expert < 0) | (tl.load(row_of + tl.maximum(expert, 0)) < 0)
        end = tl.where(absent, 0, hidden)
        value = tl.load(outputs + pair.to(tl.int64) * hidden + n, mask=n < end, other=0.0)
        total += value * tl.load(weights + pair)
    tl.store(out + token.to(tl.int64) * hidden + n, total.to(out.dtype.element_ty), mask=n < hidden)


def run_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    row_of: torch.Tensor,
) -> torch.Tensor:
    """Computes the SwiGLU experts of a step of few tokens. Launches three kernels and waits for nothing.

    Args:
        x: `[tokens, hidden]`, bf16 or float16, as are the weights; at most `MAX_TOKENS` tokens.
        topk_weights: float32 `[tokens, top_k]`.
        topk_ids: int32 `[tokens, top_k]`, distinct within a token; -1: dropped, not computed.
        gate_up: `[slots, 2 * inner, hidden]`, each slot contiguous.
        down: `[slots, hidden, inner]`, likewise.
        row_of: int32 `[experts]` or longer: slot of each expert, read when the kernels run; -1: absent, not computed.

    Returns:
        `[tokens, hidden]`, dtype of `x`. A token's experts are summed in float32 in the order of its ids, so its output
        depends neither on the other tokens nor on the slots of its experts.

    Raises:
        ValueError: more tokens than `MAX_TOKENS`.
    """
    tokens, hidden = x.shape
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens for a kernel of at most {MAX_TOKENS}")
    top_k, inner = topk_ids.shape[1], down.shape[-1]
    pairs = tokens * top_k
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    activated = x.new_empty(pairs, inner)
    outputs = x.new_empty(pairs, hidden, dtype=torch.float32)
    combined = x.new_empty(tokens, hidden)
    sizes = {
        "PAIRS": triton.next_power_of_2(pairs),
        "ROWS": max(16, triton.next_power_of_2(tokens)),
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
    }
    _gate_and_up[(pairs, triton.cdiv(inner, BLOCK_N))](
        x, ids, row_of, gate_up, activated, pairs, hidden, inner, top_k, x.stride(0), gate_up.stride(0), **sizes
    )
    _down[(pairs, triton.cdiv(hidden, BLOCK_N))](
        activated, ids, row_of, down, outputs, pairs, hidden, inner, down.stride(0), **sizes
    )
    block = 1024
    _combine[(tokens, triton.cdiv(hidden, block))](outputs, ids, row_of, weights, combined, hidden, top_k, BLOCK=block)
    return combined
