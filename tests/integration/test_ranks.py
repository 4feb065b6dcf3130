"""Two ranks: each caches what it holds and decides by the routing, which is the same on both, as are the tokens."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL
from tiny_models import VOCABULARY, save_tiny_model

from tests.apart import apart
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, hidden_states, prompts
from tests.integration.test_gated_engine import assert_equal_but_for_rounding, plan_of
from vllm_adapmoe.calibrate.text import read_sequences
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.measure.losses import prefill_losses
from vllm_adapmoe.store.file import PackOfAnother, open_pack

pytestmark = pytest.mark.engine

HELDOUT = ROOT / "examples" / "tiny_mixtral" / "heldout"
TOP_K = 2
ON_DEMAND: dict[str, Any] = {"prefetch": {"lookahead": 0}}
# With a profile, for its next-token heads decide about eviction and prefetch too.
CONFIG = VLLM_STEPS | {"profile": str(ROOT / "configs" / "tiny_mixtral.json")}
ARGS = ENGINE_ARGS | {"enforce_eager": True, "tensor_parallel_size": 2, "enable_prefix_caching": False}
EXPERT_PARALLEL = ARGS | {"enable_expert_parallel": True}
PROMPT = prompts(4, 2048, seed=6)[-1]
PROMPT_OF_TINY = prompts(4, VOCABULARY, seed=6)[-1]
SEQUENCES = read_sequences(TINY_MIXTRAL, HELDOUT, 128, 8, seed=3)


@pytest.fixture(autouse=True, scope="module")
def cores(every_core) -> Iterator[None]:
    """Where vLLM puts the ranks: it takes a NUMA node for each, and wants to be told on a machine with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{every_core[0]}|{every_core[-1]}")
        yield


def observe(engine: Engine) -> dict[str, Any]:
    """What stock vLLM and the plugin are compared by: tokens, losses of real text, the first MoE block's output."""
    losses = prefill_losses(engine, SEQUENCES)
    return {
        "answers": answers(engine, prompts(8, 2048, seed=1), greedy(logprobs=1)),
        "losses": losses.nats,
        "best": losses.best,
        "block": hidden_states(engine, PROMPT)[0].float(),
    }


@pytest.fixture(scope="module")
def stock(cores) -> dict[str, Any]:
    with Engine(TINY_MIXTRAL, None, **ARGS) as engine:
        return observe(engine)


def _watch(worker: Any) -> None:
    """Notes every event from here on: what its experts were given, and what the cache decided."""
    worker.events = []
    if not hasattr(worker, "watched"):
        worker.watched = True
        for layer in worker.moe_layers:
            layer.run_experts = _watched(worker, layer.run_experts)
    controller = worker.expert_cache.controller
    begin = controller.begin

    def noted(layer: int, experts: Any, *others: Any) -> Any:
        request = begin(layer, experts, *others)
        loads = [(load.key, load.slot, load.evicted) for load in request.loads]
        worker.events.append(("cache", layer, list(experts), request.hits, loads))
        return request

    controller.begin = noted


def _watched(worker: Any, run_experts: Any) -> Any:
    def noted(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gated: Any) -> torch.Tensor:
        tensors = x.view(torch.int16), weights, ids
        digest = hashlib.sha256(b"".join(one.contiguous().numpy().tobytes() for one in tensors)).hexdigest()
        worker.events.append(("input", digest, ids.tolist()))
        return run_experts(x, weights, ids, gated)

    return noted


def _seen(worker: Any) -> dict[str, Any]:
    cache = worker.expert_cache
    timed = ("stall_seconds", "fetch_seconds")
    return {
        "inputs": [event[1] for event in worker.events if event[0] == "input"],
        "routing": [event[2] for event in worker.events if event[0] == "input"],
        "decisions": [event[1:] for event in worker.events if event[0] == "cache"],
        "slots": [one.tolist() for one in cache.slot_maps],
        "resident": cache.resident().tolist(),
        "held": cache.controller.is_local.tolist(),
        "counted": {key: value for key, value in worker.expert_cache_stats().items() if key not in timed},
    }


def watched(engine: Engine, config: dict[str, Any], plan: dict[str, Any] | None = None) -> tuple[Any, list[Any]]:
    """Answers from empty slots under another policy, and what each rank saw and did on the way."""
    engine.call("set_cache", CONFIG | config)
    engine.call("set_gating", plan)
    engine.llm.collective_rpc(_watch)
    given = answers(engine, prompts(8, 2048, seed=1), greedy(logprobs=1))
    return given, engine.llm.collective_rpc(_seen)


def check_shards(ranks: list[dict[str, Any]], gated: bool) -> None:
    """Of one routing, each rank fetches and runs what it holds: the two together all of it, and nothing twice."""
    held = [torch.tensor(one["held"]) for one in ranks]
    assert (held[0] ^ held[1]).all(), "every expert is held by one rank"
    assert ranks[0]["inputs"] == ranks[1]["inputs"] and len(ranks[0]["decisions"]) == len(ranks[0]["inputs"])
    for one, mine in zip(ranks, held, strict=True):
        assert not (torch.tensor(one["resident"]) & ~mine).any()
        for ids, (layer, experts, *_) in zip(one["routing"], one["decisions"], strict=True):
            chosen = sorted(expert for expert in {expert for row in ids for expert in row} if mine[layer, expert])
            assert set(experts) <= set(chosen) if gated else experts == chosen
        assert any(not experts for _, experts, *_ in one["decisions"]), "steps that a rank has nothing to do in"


def test_tensor_parallel(stock):
    """Ranks see the same bits, so they route, gate, load and evict alike; only speculation follows the clock."""
    with Engine(TINY_MIXTRAL, CONFIG | {"cache_fraction": 0.5}, **ARGS) as engine:
        mine = observe(engine)
        assert mine["answers"] == stock["answers"]
        assert (mine["losses"] == stock["losses"]).all() and torch.equal(mine["block"], stock["block"])

        for config in (ON_DEMAND, ON_DEMAND | {"eviction": "next_use"}):  # the defaults with and without a profile
            given, (first, second) = watched(engine, config)
            assert given == stock["answers"]
            assert first == second, "inputs, routing, hits, loads, victims, slots and counters"
            loads = [load for *_, its in first["decisions"] for load in its]
            assert sum(victim is not None for *_, victim in loads) > 100
        gated, (first, second) = watched(engine, ON_DEMAND, plan_of(TINY_MIXTRAL, 0.4))
        assert first == second and gated != stock["answers"]
        assert first["counted"]["kept_experts"] < 0.9 * TOP_K * first["counted"]["gated_tokens"]

        given, ranks = watched(engine, {})
        assert given == stock["answers"]
        assert ranks[0]["inputs"] == ranks[1]["inputs"], "whatever either has fetched ahead"
        assert min(one["counted"]["prefetch_hits"] for one in ranks) > 0
        given, ranks = watched(engine, {}, plan_of(TINY_MIXTRAL, 0.4))
        assert given == gated and ranks[0]["inputs"] == ranks[1]["inputs"]


def test_expert_parallel(stock, tmp_path):
    """Each rank holds half of the experts whole. Stock vLLM's CPU kernel crashes over the other half (0.32)."""
    config = CONFIG | {"store_dir": str(tmp_path)}
    plan = plan_of(TINY_MIXTRAL, 0.4)
    with Engine(TINY_MIXTRAL, config | {"cache_fraction": 0.5}, **EXPERT_PARALLEL) as engine:
        mine = observe(engine)
        # Up to here the same bits as under tensor parallelism; then whole experts are summed, not halves of all.
        difference = (mine["block"] - stock["block"]).abs().max()
        assert 0 < difference <= 2**-7 * stock["block"].abs().max(), "two roundings to bf16"
        assert_equal_but_for_rounding(mine["losses"], stock["losses"])
        assert (mine["best"] == stock["best"]).mean() > 0.97

        given, ranks = watched(engine, ON_DEMAND)
        assert given == mine["answers"], "with prefetch, and without"
        check_shards(ranks, gated=False)
        gated, ranks = watched(engine, ON_DEMAND, plan)
        assert ranks[0]["counted"]["kept_experts"] == ranks[1]["counted"]["kept_experts"]
        assert ranks[0]["counted"]["kept_experts"] < 0.9 * TOP_K * ranks[0]["counted"]["gated_tokens"]
        check_shards(ranks, gated=True)
        given, ranks = watched(engine, {}, plan)
        assert given == gated and ranks[0]["inputs"] == ranks[1]["inputs"]
        assert min(one["counted"]["prefetch_hits"] for one in ranks) > 0

    packs = sorted(tmp_path.glob("*.pack"))
    assert [path.name for path in packs] == ["experts-linear-0-of-2.pack", "experts-linear-1-of-2.pack"]
    with pytest.raises(PackOfAnother, match="another tensor_parallel_rank"):
        open_pack(packs[0], {"tensor_parallel_size": "2", "tensor_parallel_rank": "0"})

    # From those packs, and with every expert resident, where there are none.
    for setting in (config | {"cache_fraction": 0.25}, CONFIG | {"cache_fraction": 1.0}):
        with Engine(TINY_MIXTRAL, setting, **EXPERT_PARALLEL) as engine:
            assert answers(engine, prompts(8, 2048, seed=1), greedy(logprobs=1)) == mine["answers"]
            engine.call("set_gating", plan)
            assert answers(engine, prompts(8, 2048, seed=1), greedy(logprobs=1)) == gated


def test_expert_parallel_round_robin(tiny_model):
    """Every other expert, beside a shared one, and in waves: fewer slots than a layer has experts on a rank."""
    model = tiny_model("deepseek_v3")
    with Engine(model, None, **ARGS) as engine:
        stock = hidden_states(engine, PROMPT_OF_TINY)[0].float()
    config, placement = VLLM_STEPS | {"cache_experts": 3}, {"expert_placement_strategy": "round_robin"}
    with Engine(model, config, **EXPERT_PARALLEL, **placement) as engine:
        mine = hidden_states(engine, PROMPT_OF_TINY)[0].float()
        assert engine.llm.collective_rpc(_held) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert 0 < (mine - stock).abs().max() <= 2**-6 * stock.abs().max()


@pytest.mark.parametrize("ranks", [ARGS, EXPERT_PARALLEL], ids=["tensor parallel", "expert parallel"])
def test_weights_that_are_replaced(tiny_model, tmp_path, ranks):
    """Each rank takes its own part of the new experts: what an engine serves that starts with them."""
    folders = [tiny_model("qwen3_moe"), apart(save_tiny_model, "qwen3_moe", tmp_path / "other", seed=1)]
    config = VLLM_STEPS | {"cache_fraction": 0.5}
    asked, params = prompts(4, VOCABULARY, seed=1), greedy(logprobs=1)
    with Engine(folders[1], config | {"store": "host"}, **ranks) as engine:
        expected = answers(engine, asked, params)
    with Engine(folders[0], config | {"store_dir": str(tmp_path / "store")}, **ranks) as engine:
        before = answers(engine, asked, params)
        assert before != expected
        for folder, tokens in zip(reversed(folders), (expected, before), strict=True):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            assert answers(engine, asked, params) == tokens


def _held(worker: Any) -> list[int]:
    return worker.expert_cache.controller.is_local[0].nonzero()[0].tolist()
