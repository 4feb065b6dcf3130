"""vLLM's own Triton kernel on slots, through the map that `MappedExperts` gives it: run in Triton's interpreter.

Two C++ operations of a GPU are played in PyTorch: the one that sorts pairs by expert, as it is documented, and the sum.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # or vLLM takes Triton for missing

import torch  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts  # noqa: E402

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER, SLOTS = 5, 2, 6, 64, 32, 10


def align(ids, num_experts, block, sorted_ids, expert_ids, padded, expert_map=None, scatter_idx=None):
    flat = ids.reshape(-1)
    sorted_ids.fill_(flat.numel())
    expert_ids.fill_(-1)
    end = 0
    for expert in range(num_experts):
        row = expert if expert_map is None else int(expert_map[expert])
        pairs = (flat == expert).nonzero().view(-1).int()
        for part in pairs.split(block) if row >= 0 and len(pairs) else ():
            sorted_ids[end : end + len(part)] = part
            expert_ids[end // block] = row
            end += block
    padded.fill_(end)


def moe_sum(outputs, total, ids=None, expert_map=None):
    if expert_map is not None:  # what has no row was never written
        outputs = outputs.masked_fill((expert_map[ids.long()] < 0).unsqueeze(-1), 0)
    total.copy_(outputs.float().sum(1))


ops.moe_align_block_size, ops.moe_sum = align, moe_sum

torch.manual_seed(0)
x = torch.randn(TOKENS, HIDDEN).half()
w1 = (torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5).half()
w2 = (torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5).half()
ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).int()
weights = torch.rand(TOKENS, TOP_K)
slots = torch.randperm(SLOTS)[:EXPERTS]
pools = []
for tensor in (w1, w2):
    pool = torch.full((SLOTS, *tensor.shape[1:]), float("nan")).half()  # whoever reads another slot will show it
    pool[slots] = tensor
    pools.append(pool)
row_of = torch.cat((slots.int(), torch.tensor([-1], dtype=torch.int32)))


def on_slots(ids, row_of):
    return fused_experts(x.clone(), *pools, weights, ids.int(), global_num_experts=EXPERTS + 1, expert_map=row_of)


whole = fused_experts(x.clone(), w1, w2, weights, ids)
assert torch.equal(on_slots(ids, row_of), whole), "slots"

dropped = torch.rand(TOKENS, TOP_K) < 0.4
kept = fused_experts(x.clone(), w1, w2, weights * ~dropped, ids)
assert torch.equal(on_slots(torch.where(dropped, EXPERTS, ids), row_of), kept), "dropped"

first = torch.arange(EXPERTS + 1) < EXPERTS // 2
waves = [on_slots(ids, row_of.where(wave, -1)).float() for wave in (first, ~first)]
error = (sum(waves) - whole.float()).abs().max() / whole.float().abs().max()
assert error < 2**-9, f"waves: {error}"
