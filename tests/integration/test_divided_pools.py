"""Layers of one shape in several pools, where a kernel reads only so much of a tensor: the tokens of stock vLLM."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_MIXTRAL

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.integration.loading import slot_pools
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape
from vllm_adapmoe.store.record import RecordLayout

EXPERTS = 96
GATE_UP_BYTES = 2 * 256 * 128 * 2
"""Of one expert: the largest tensor of its record."""
LIMIT = 20 * GATE_UP_BYTES


def pools(worker):
    found = worker.expert_cache.pools
    return [(pool.num_slots, max(tensor.nbytes for tensor in pool.tensors.values())) for pool in found]


ARGS = ENGINE_ARGS | {"enforce_eager": True}
ASKED, PARAMS = prompts(4, 2048, seed=3), greedy(logprobs=1)


@pytest.fixture(scope="module")
def stock():
    with Engine(TINY_MIXTRAL, None, **ARGS) as engine:
        return answers(engine, ASKED, PARAMS)


@pytest.mark.engine
@pytest.mark.parametrize("store", ["host", "file"])
def test_pools_stay_below_what_the_kernel_reads(stock, monkeypatch, store):
    monkeypatch.setattr(slot_pools, "kernel_of", lambda layer: type("MarlinExperts", (), {})())
    monkeypatch.setitem(slot_pools.TENSOR_BYTES, "MarlinExperts", LIMIT)
    with Engine(TINY_MIXTRAL, VLLM_STEPS | {"cache_experts": EXPERTS // 2, "store": store}, **ARGS) as engine:
        assert answers(engine, ASKED, PARAMS) == stock
        found = engine.llm.collective_rpc(pools)[0]
    assert len(found) == 3 and sum(slots for slots, _ in found) == EXPERTS // 2
    assert all(nbytes < LIMIT for _, nbytes in found)


@pytest.mark.parametrize(("kernel", "pools"), [("MarlinExperts", 3), ("TritonExperts", 1)])
def test_only_a_kernel_with_a_limit_divides(monkeypatch, kernel, pools):
    """Layers of two shapes: 12 whose tensors are too long together, and 2 whose are not."""
    monkeypatch.setattr(slot_pools, "kernel_of", lambda layer: type(kernel, (), {})())
    monkeypatch.setitem(slot_pools.TENSOR_BYTES, "MarlinExperts", LIMIT)
    gate_up, down = torch.empty(8, GATE_UP_BYTES), torch.empty(8, GATE_UP_BYTES // 2)
    big = RecordLayout.of({"w13": gate_up.to(torch.uint8), "w2": down.to(torch.uint8)})
    small = RecordLayout.of({"w13": gate_up[:, :1024].to(torch.uint8)})
    layers = [SimpleNamespace(local_num_experts=8)] * 14
    planned = slot_pools.SlotPools(EngineSettings(config=AdapMoEConfig(cache_fraction=0.5)), None, layers, None)  # type: ignore[arg-type]
    planned.groups = [list(range(12)), [12, 13]]
    planned.shapes = [ExpertShape(96, big.nbytes, 2), ExpertShape(16, small.nbytes, 2)]
    planned.slots, planned.memory = [48, 8], DeviceMemory(1 << 40)
    planned.plan_for(SimpleNamespace(layouts=[big] * 12 + [small] * 2))  # type: ignore[arg-type]
    assert len(planned.groups) == pools + 1
    assert sorted(layer for group in planned.groups for layer in group) == list(range(14))
    assert planned.slots == [48 // pools] * pools + [8]
