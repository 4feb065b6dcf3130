"""vLLM's CUDA operations around its expert kernels, line by line in PyTorch, with every index checked.

Written from vLLM 0.32.0's csrc/moe/moe_align_sum_kernels.cu (the same in 0.30 to 0.33, but for an output that we do not
ask for), csrc/moe/marlin_moe_wna16/marlin_template.h and csrc/quantization/w8a8/fp8/common.cu. Where the kernel would
read or write beyond a buffer, or count in a bin that is never read, these raise `OutOfBounds`.
"""

from typing import Any

import torch

WARP_SIZE = 32


class OutOfBounds(AssertionError):
    """The CUDA kernel would have read or written where it must not."""


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise OutOfBounds(what)


def _local_expert_id(expert_id: int, expert_map: torch.Tensor | None, num_experts: int) -> int:
    """`get_local_expert_id`: what lies outside the experts is ignored; a mapped id is taken as it is."""
    if expert_id >= num_experts or expert_id < 0:
        return -1
    if expert_map is not None:
        _check(expert_id < len(expert_map), f"expert_map[{expert_id}] of a map of {len(expert_map)}")
        return int(expert_map[expert_id])
    return expert_id


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    maybe_expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """`moe_align_block_size`: counts and sorts pairs by the mapped id."""
    padded_num_experts = -(-num_experts // WARP_SIZE) * WARP_SIZE
    if padded_num_experts >= 1024:
        raise RuntimeError("padded_num_experts must be less than 1024")  # STD_TORCH_CHECK
    assert scatter_idx is None
    flat = topk_ids.reshape(-1).tolist()
    numel = len(flat)
    local = [_local_expert_id(one, maybe_expert_map, num_experts) for one in flat]
    counts = [0] * num_experts
    for one in local:
        if one != -1:
            _check(0 <= one < num_experts, f"pairs counted in bin {one} of {num_experts}")
            counts[one] += 1
    cumsum = [0]
    for count in counts:
        cumsum.append(cumsum[-1] + -(-count // block_size) * block_size)
    _check(cumsum[-1] <= len(sorted_token_ids), f"{cumsum[-1]} sorted ids in a buffer of {len(sorted_token_ids)}")
    _check(cumsum[-1] // block_size <= len(experts_ids), "blocks beyond the buffer")
    sorted_token_ids.fill_(numel)
    experts_ids.fill_(-1)  # `inactive_expert_id`, where no block is
    for expert in range(num_experts):
        experts_ids[cumsum[expert] // block_size : cumsum[expert + 1] // block_size] = expert
    place = list(cumsum)
    for index, one in enumerate(local):
        if one != -1:
            sorted_token_ids[place[one]] = index
            place[one] += 1
    num_tokens_post_pad.fill_(cumsum[-1])


def moe_sum(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """`moe_sum`: float32, in the order of a token's choices; `moe_sum_pad_aware_skip` for what has no row."""
    total = torch.zeros(output.shape, dtype=torch.float32)
    for choice in range(input.shape[1]):
        for token in range(input.shape[0]):
            if topk_ids is not None:
                expert = int(topk_ids[token, choice])
                if expert < 0:
                    continue
                if expert_map is not None:
                    _check(expert < len(expert_map), f"expert_map[{expert}] of a map of {len(expert_map)}")
                    if int(expert_map[expert]) < 0:
                        continue
            total[token] += input[token, choice].float()
    output.copy_(total)


MARLIN_WEIGHTS: dict[int, torch.Tensor] = {}
"""What the first number of a slot's packed weights stands for: float `[n, k]`."""


def moe_wna16_marlin_gemm(
    input: torch.Tensor, output: torch.Tensor, b_qweight: torch.Tensor, *others: Any, **given: Any
) -> torch.Tensor:
    """`moe_wna16_marlin_gemm`, as far as it is about which rows are multiplied by which expert's weights.

    A block's expert is taken as it is: `update_next_moe_block_data` knows no -1. Rows of no block are not written.
    Weights are not dequantised: a slot's first number names its matrix in `MARLIN_WEIGHTS`.
    """
    sorted_ids, expert_ids, padded, weights = others[-4:]
    top_k, block = given["top_k"], given["moe_block_size"]
    rows = given["size_m"] * top_k
    for number in range(int(padded) // block):
        expert = int(expert_ids[number])
        _check(0 <= expert < len(b_qweight), f"weights of row {expert} of {len(b_qweight)}")
        matrix = MARLIN_WEIGHTS[int(b_qweight[expert].reshape(-1)[0])]
        for pair in sorted_ids[number * block : (number + 1) * block].tolist():
            if pair >= rows:
                continue
            value = input[pair // top_k].float() @ matrix.T
            if given["mul_topk_weights"]:
                value = value * weights.reshape(-1)[pair]
            output[pair] = value.to(output.dtype)
    return output


def scaled_fp8_quant(
    input: torch.Tensor, scale: torch.Tensor | None = None, *, use_per_token_if_dynamic: bool = False, **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scaled_fp8_quant` with dynamic scales: of each row, or one of the largest value of all rows."""
    assert scale is None
    rows = input.float().abs()
    largest = rows.amax(-1, keepdim=True) if use_per_token_if_dynamic else rows.max().view(1)
    scale = torch.clamp(largest / 448, min=1 / (448 * 512))
    return (input.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
