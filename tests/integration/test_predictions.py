"""A prediction never ends an engine and never changes a token, whatever the model's routers are."""

import logging
from typing import Any

import pytest
from tiny_models import VOCABULARY

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from tests.integration.test_worker_trace import end_readers
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.worker.expert_predictor import STRICT
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace_file import read_trace

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True, "model_impl": "transformers"}
ASKED, PARAMS = prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)
HALF = VLLM_STEPS | {"cache_fraction": 0.5}


def stock(model: Any) -> list[Any]:
    with Engine(model, None, **ARGS) as engine:
        return answers(engine, ASKED, PARAMS)


def test_routers_that_cannot_be_called_like_others(tiny_model, caplog, monkeypatch):
    """ZAYA's wants another shape, another layer's state, is not linear and has a choice that is no expert."""
    model = tiny_model("zaya")
    expected = stock(model)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with Engine(model, HALF, **ARGS) as engine:
        assert answers(engine, ASKED, PARAMS) == expected
        stats = engine.cache_stats()
    (said,) = {line for line in caplog.messages if "no predictions for" in line}
    assert "MoE layers 1 to 3 (ZayaRouter: IndexError" in said
    assert stats["misses"] > 0


def test_layers_of_different_top_k(tiny_model, tmp_path):
    """Eight layers ahead, of a model that has four; the replay of the trace decides as the worker did."""
    model = tiny_model("hunyuan_v1_moe")
    ahead = {"lookahead": 8, "max_experts": 2}
    config = HALF | {"prefetch": ahead, "trace_out": str(tmp_path / "trace")}
    expected = stock(model)
    with Engine(model, config, **ARGS) as engine:
        engine.llm.collective_rpc(end_readers)
        assert answers(engine, ASKED, PARAMS) == expected
        counted = engine.cache_stats()
    info, steps = read_trace(tmp_path / "trace")
    assert counted["prefetch_hits"] > 0 and info.lookahead == 8 and info.top_k == 3
    assert [max((row > 0).sum(1).max() for row in (step.weights[layer] for step in steps)) for layer in range(4)] == [
        2, 3, 1, 2,
    ]  # fmt: skip
    replayed = replay(info, steps, CacheSetup([16], "next_use", "pool", **ahead)).stats
    for name, value in replayed.items():
        if name not in ("stall_seconds", "fetch_seconds"):
            assert counted[name] == value, name


def test_a_prediction_that_fails(tiny_model, caplog, monkeypatch):
    model = tiny_model("qwen3_moe")
    expected = stock(model)
    with Engine(model, HALF, **ARGS) as engine:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        engine.llm.collective_rpc(_break_predictions)
        with pytest.raises(ZeroDivisionError):  # in tests
            engine.llm.collective_rpc(lambda worker: worker.predictor.begin_step({"a": 1}))
        monkeypatch.delenv(STRICT)
        assert answers(engine, ASKED, PARAMS) == expected
        # The same record may come by more than one handler.
        (said,) = {id(record): record for record in caplog.records if "a prediction failed" in record.message}.values()
        assert said.exc_info is not None and said.exc_info[0] is ZeroDivisionError
        assert engine.cache_stats()["prefetches"] == 0


def _break_predictions(worker: Any) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    worker.predictor.experts.batch_chances = fail
