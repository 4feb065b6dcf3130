"""Floors that move while requests run, and layers without any: the tokens stay those of stock vLLM."""

import itertools
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY_MIXTRAL

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.calibrate.text import read_sequences
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.policy.controller import REVISION_STEPS

pytestmark = pytest.mark.engine

HELDOUT = ROOT / "examples" / "tiny_mixtral" / "heldout"
PROFILE = str(ROOT / "configs" / "tiny_mixtral.json")
LAYERS, EXPERTS, SLOTS, TOP_K = 12, 8, 48, 2
BATCHES = ("prose", "prose", "python", "python", "python")
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 200


def run(engine: Engine) -> tuple[list[list[int]], list[tuple[str, list[int]]]]:
    """Tokens of every request of the batches, and the floors after each step that left requests running."""
    core = engine.llm.llm_engine
    tokens: dict[str, list[int]] = {}
    floors = []
    for number, kind in enumerate(BATCHES):
        params = greedy()
        params.max_tokens = OUTPUT_TOKENS
        for row, ids in enumerate(read_sequences(TINY_MIXTRAL, HELDOUT / f"{kind}.txt", PROMPT_TOKENS, 8, number)):
            core.add_request(f"{number}-{row}", {"prompt_token_ids": ids}, params)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            if engine.cached and core.has_unfinished_requests():
                floors.append((kind, engine.llm.collective_rpc(_floors)[0]))
    return [tokens[name] for name in sorted(tokens)], floors


def _floors(worker: Any) -> list[int]:
    return worker.expert_cache.controller.pools[0].floors.tolist()


def _watch_residents(worker: Any) -> None:
    """Notes how many experts of each layer are there whenever layer 0 has been served."""
    cache = worker.expert_cache
    release, worker.residents = cache.release, []

    def watched(layer: int, experts: Any) -> None:
        release(layer, experts)
        if layer == 0:
            worker.residents.append(list(cache.controller.pools[0].count))

    cache.release = watched


def _residents(worker: Any) -> list[list[int]]:
    return worker.residents


@pytest.fixture(scope="module")
def stock():
    with Engine(TINY_MIXTRAL, None, enforce_eager=True, **ENGINE_ARGS) as engine:
        return run(engine)[0], answers(engine, prompts(8, 2048, seed=8), greedy())


@pytest.fixture(scope="module")
def engine():
    config = VLLM_STEPS | {"cache_experts": SLOTS, "store": "host", "allocation": "trace", "eviction": "lru"}
    with Engine(TINY_MIXTRAL, config, enforce_eager=True, **ENGINE_ARGS) as running:
        yield running


def test_floors_follow_the_traffic(stock, engine):
    """From prose to code: the floors move while requests run, more than once, and no token is another."""
    tokens, floors = run(engine)
    assert tokens == stock[0]
    of_prose, of_code = ([floor for kind, floor in floors if kind == wanted] for wanted in ("prose", "python"))
    assert len(of_prose) > REVISION_STEPS and len(of_code) > 2 * REVISION_STEPS
    assert all(sum(floor) == SLOTS - 1 - TOP_K for _, floor in floors)  # one slot is speculation's
    assert max(of_prose[0]) - min(of_prose[0]) <= 1, "as equal as can be, before there was any traffic"
    changes = sum(one != other for (_, one), (_, other) in itertools.pairwise(floors))
    assert changes >= 3
    assert of_prose[-1] != of_prose[0] and of_code[-1] != of_prose[-1]
    stats = engine.cache_stats()
    assert stats["misses"] > 0 and stats["hits"] > 0


def test_a_layer_without_slots_streams_through(stock, engine):
    """Two layers that nothing is to be gained in get no floor, and run all the same."""
    flat, falling = np.ones(EXPERTS + 1), 2 * (1 - np.arange(EXPERTS + 1) / EXPERTS) ** 2
    curves = [(flat if layer in (0, 5) else falling).tolist() for layer in range(LAYERS)]
    settings = {"allocation": "profile", "profile": PROFILE, "eviction": "lru"}
    engine.call("set_cache", settings, curves)
    floors = engine.llm.collective_rpc(_floors)[0]
    assert [layer for layer, floor in enumerate(floors) if floor == 0] == [0, 5]
    assert sum(floors) == SLOTS - 1 - TOP_K
    engine.llm.reset_prefix_cache()
    before = engine.cache_stats()
    engine.llm.collective_rpc(_watch_residents)
    assert answers(engine, prompts(8, 2048, seed=8), greedy()) == stock[1]
    assert engine.cache_stats()["misses"] > before["misses"]
    residents = np.array(engine.llm.collective_rpc(_residents)[0])
    assert residents[:, 0].max() > 0, "it is served"
