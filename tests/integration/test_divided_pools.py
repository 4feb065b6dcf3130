"""Layers of one shape in several pools, where a kernel reads only so much of a tensor: the tokens of stock vLLM."""

import pytest
from conftest import TINY_MIXTRAL

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration import loading
from vllm_adapmoe.integration.engine import Engine

EXPERTS = 96
GATE_UP_BYTES = 2 * 256 * 128 * 2
"""Of one expert: the largest tensor of its record."""
LIMIT = 20 * GATE_UP_BYTES


def pools(worker):
    return [(pool.num_slots, max(tensor.nbytes for tensor in pool.tensors.values())) for pool in worker.cache.pools]


@pytest.mark.engine
@pytest.mark.parametrize("store", ["host", "file"])
def test_pools_stay_below_what_the_kernel_reads(monkeypatch, store):
    args = ENGINE_ARGS | {"enforce_eager": True}
    asked, params = prompts(4, 2048, seed=3), greedy(logprobs=1)
    with Engine(TINY_MIXTRAL, None, **args) as stock:
        expected = answers(stock, asked, params)
    monkeypatch.setattr(loading, "kernel_of", lambda layer: type("MarlinExperts", (), {})())
    monkeypatch.setitem(loading.TENSOR_BYTES, "MarlinExperts", LIMIT)
    with Engine(TINY_MIXTRAL, VLLM_STEPS | {"cache_experts": EXPERTS // 2, "store": store}, **args) as engine:
        assert answers(engine, asked, params) == expected
        found = engine.llm.collective_rpc(pools)[0]
    assert len(found) == 3 and sum(slots for slots, _ in found) == EXPERTS // 2
    assert all(nbytes < LIMIT for _, nbytes in found)
