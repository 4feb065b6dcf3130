"""`trace_out` in steps that the GPU decides: a host's frames, and a replay that counts what the GPU counted."""

import logging
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MIXTRAL
from vllm.config import CUDAGraphMode

from tests.integration.test_device_path import ARGS, GATED, HALF, as_on_gpu, interpreted, short  # noqa: F401 - fixtures
from tests.integration.test_graph_capture import TOKENS, Steps, as_if_capturing  # noqa: F401 - a fixture
from tests.integration.test_worker_trace import end_readers
from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.device import decode
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.worker.expert_predictor import STRICT, ExpertPredictor
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step
from vllm_adapmoe.simulate.trace_file import read_trace

pytestmark = pytest.mark.engine


def frame(step: Step) -> dict[str, Any]:
    """All of a step but times, and the random part of requests' ids."""
    predicted = {
        f"predicted {key}": (prediction.ids, prediction.keep_mask) for key, prediction in step.predicted.items()
    }
    expected = {f"expected {layer}": chances for layer, chances in step.expected.items()}
    requests = [name.partition("-")[0] for name in step.requests]
    routing = {name: getattr(step, name) for name in ("positions", "ids", "weights", "drafted", "begin")}
    return routing | {"requests": requests} | predicted | expected


def assert_equal(ours: Step, theirs: Step, without: set[str]) -> None:
    got, wanted = frame(ours), frame(theirs)
    assert got.keys() == wanted.keys()
    for name in got.keys() - without:
        np.testing.assert_equal(got[name], wanted[name], err_msg=name)


def recorded(path: Path, config: dict[str, Any]) -> tuple[list[Any], list[Step]]:
    """What an engine answers, and the steps that it records."""
    with Engine(TINY_MIXTRAL, config | {"trace_out": str(path)}, **ARGS) as engine:
        said = [short(engine), short(engine)]
    return said, list(read_trace(path)[1])


@pytest.mark.parametrize("gating", [{}, GATED], ids=["all-kept", "gated"])
def test_frames_are_those_of_a_host_that_decides(as_on_gpu, interpreted, monkeypatch, tmp_path, gating):  # noqa: F811
    monkeypatch.setattr(decode, "MAX_TOKENS", 3)
    (said, by_host), (same, by_device) = (
        recorded(tmp_path / who, HALF | gating | {"decode": who}) for who in ("host", "device")
    )
    assert same == said
    # Prompts of seven tokens by the host, three steps of two tokens by the GPU, and the same again.
    assert [len(step.positions) for step in by_device] == [7, 2, 2, 2] * 2
    # With heads, a host that decides learns sooner what requests are expected to use.
    without = {"begin"} if gating else set()
    for ours, theirs in zip(by_device, by_host, strict=True):
        assert_equal(ours, theirs, without)
    last = by_device[-1]
    assert {(0, 1), (0, 4), (10, 1)} <= last.predicted.keys() and last.seconds > by_device[-2].seconds
    assert (len(last.expected) == 12 and (-1, 1) in last.predicted) == bool(gating)
    assert (last.weights == 0).any() == bool(gating)
    if gating:
        arrive_late(monkeypatch)
        late = recorded(tmp_path / "late", HALF | gating | {"decode": "device"})[1]
        assert [(-1, 1) in step.predicted for step in late] == [False, True, True, True] * 2
        for ours, theirs in zip(late, by_host, strict=True):
            theirs.predicted = {key: theirs.predicted[key] for key in ours.predicted}
            assert_equal(ours, theirs, {"begin"})


def arrive_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies arrive once one is waited for, with those before it; but first layers' are late after prompts alone."""
    arrived: set[HostCopy] = set()
    copies: list[HostCopy] = []
    init = HostCopy.__init__

    def start(self: HostCopy, *tensors: torch.Tensor) -> None:
        init(self, *tensors)
        first_layers = sum(len(copy.tensors) == 1 for copy in copies)
        if len(tensors) == 1 and first_layers % 4:
            arrived.add(self)
        copies.append(self)

    monkeypatch.setattr(HostCopy, "__init__", start)
    monkeypatch.setattr(HostCopy, "wait", lambda self: arrived.update(copies[: copies.index(self) + 1]))
    monkeypatch.setattr(HostCopy, "arrived", property(lambda self: self in arrived))


@torch.inference_mode()
def trace_replayed_and_run(worker: Any) -> list[bool]:
    """Steps of other ids, replayed from a graph and run: whether their traces are equal."""
    steps, equal = Steps(worker), []
    replay = steps.capture()
    for _ in range(2):
        steps.draw()
        traced = []
        for launch in (replay, partial(steps.in_context, CUDAGraphMode.NONE)):
            steps.served(launch)
            traced.append([tensor[: len(steps.layers)] for tensor in worker.predictor._launched.traced.tensors])
        (ids, _, products), _ = traced
        assert torch.equal(ids[0], steps.ids[:TOKENS]) and products.any()
        equal.append(all(torch.equal(one, other) for one, other in zip(*traced, strict=True)))
    return equal


def test_a_graph_holds_the_trace(as_on_gpu, interpreted, as_if_capturing, tmp_path):  # noqa: F811
    with Engine(TINY_MIXTRAL, HALF | GATED | {"decode": "device", "trace_out": str(tmp_path / "t")}, **ARGS) as engine:
        assert engine.llm.collective_rpc(trace_replayed_and_run) == [[True, True]]


def test_steps_are_recorded_in_order_whatever_arrives_late(monkeypatch):
    """A step whose first layer's prediction is on its way holds those behind it back; nothing waits but the end."""
    predictor = ExpertPredictor.__new__(ExpertPredictor)
    recorded: list[str] = []
    vars(predictor).update(failed=False, experts=None, recorder=object(), _unwritten=deque())
    monkeypatch.setattr(predictor, "_record_traced", lambda recorder, step, *rest: recorded.append(step.name))
    late = SimpleNamespace(arrived=False, wait=lambda: vars(late).update(arrived=True))
    for name, first_layer in (("first", None), ("second", late), ("third", None)):
        step: Any = SimpleNamespace(name=name, first_layer=first_layer, traced=object())
        predictor.record_finished(step, np.zeros((1, 1, 1)))
    assert recorded == ["first"]
    predictor.write_all_traced()
    assert recorded == ["first", "second", "third"] and late.arrived


def lose_the_trace(worker: Any) -> None:
    """From here on as with a graph that was captured without a trace."""
    worker.predictor.trace.record = lambda *args: None


def test_a_trace_that_fails_ends_alone(as_on_gpu, interpreted, caplog, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv(STRICT)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with Engine(TINY_MIXTRAL, HALF | {"decode": "device", "trace_out": str(tmp_path / "t")}, **ARGS) as engine:
        said = short(engine)
        engine.llm.collective_rpc(lose_the_trace)
        assert short(engine) == said
        assert engine.llm.collective_rpc(lambda worker: worker.predictor.is_tracing) == [False]
    (error,) = {record.exc_info[1] for record in caplog.records if "a prediction failed" in record.message}
    assert "the CUDA graph of a decode step does not trace MoE layers [0, 1, 2" in str(error)


@pytest.mark.parametrize(
    "config",
    [
        {},
        GATED | {"prefetch": {"lookahead": 3, "max_experts": 2}},
        {"eviction": "lru", "allocation": "uniform"},
    ],
    ids=["defaults", "next-token heads, gated", "lru, floors"],
)
def test_worker_and_replay_agree(as_on_gpu, interpreted, monkeypatch, tmp_path, config):  # noqa: F811
    """Steps of the host and of the GPU in turns, prefetches of both included: all counters of the whole run."""
    monkeypatch.setattr(decode, "MAX_TOKENS", 3)
    config = HALF | config | {"decode": "device", "trace_out": str(tmp_path / "trace")}
    with Engine(TINY_MIXTRAL, config, **ARGS) as engine:
        engine.llm.collective_rpc(end_readers)
        for _ in range(3):
            short(engine)
        counted = engine.cache_stats()
    info, steps = read_trace(tmp_path / "trace")
    settings = AdapMoEConfig.parse(config)
    setup = CacheSetup.from_config(settings, [48], None, heads="profile" in config)
    replayed = replay(info, steps, setup, device_tokens=3).stats
    assert counted["prefetch_hits"] > 0 and counted["prefetches_wasted"] > 0
    for name, value in replayed.items():
        if name not in ("stall_seconds", "fetch_seconds"):  # of the clock, which a replay without times does not have
            assert counted[name] == value, name
    assert replay(info, steps, setup).stats != replayed, "a host that decides alone"
