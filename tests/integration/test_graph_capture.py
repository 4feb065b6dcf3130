"""Whole steps in CUDA graphs, captured as model runner V2 does: by vLLM's `CudaGraphManager`, in recorded graphs."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.worker.gpu import cudagraph_utils

from tests.integration import graph_recorder
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS
from tests.integration.test_device_path import as_on_gpu, interpreted  # noqa: F401 - fixtures
from vllm_adapmoe.device.deferred import RoutingNotRecorded
from vllm_adapmoe.integration.layers import mapped_experts
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True, "dtype": "float16"}
CONFIG = VLLM_STEPS | {"cache_fraction": 0.5, "store": "host", "decode": "device"}
GATED = {"profile": str(ROOT / "configs" / "tiny_mixtral.json"), "gating": {"mode": "token", "target_experts": 1.5}}
TOKENS, PADDED = 3, 4


class Steps:
    """All MoE layers of a worker on inputs whose addresses stay, one after the other."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.layers = worker, worker.moe_layers[:4]
        hidden, top_k = worker.model_config.get_hidden_size(), self.layers[0].top_k
        self.x = torch.zeros(PADDED, hidden, dtype=torch.float16)
        self.weights = torch.zeros(PADDED, top_k)
        self.ids = torch.zeros(PADDED, top_k, dtype=torch.int32)
        self.is_padding = torch.ones(PADDED, dtype=torch.bool)
        self.outputs = torch.zeros(len(self.layers), PADDED, hidden, dtype=torch.float16)
        self.chance = torch.Generator().manual_seed(0)

    def draw(self) -> None:
        """Another step."""
        self.x.copy_(torch.randn(self.x.shape, generator=self.chance))
        weights = torch.rand(self.weights.shape, generator=self.chance)
        self.weights.copy_(weights / weights.sum(1, keepdim=True))
        experts = [torch.randperm(8, generator=self.chance)[: self.ids.shape[1]] for _ in range(PADDED)]
        self.ids.copy_(torch.stack(experts))
        self.is_padding.copy_(torch.arange(PADDED) >= TOKENS)

    def run(self) -> None:
        for output, layer in zip(self.outputs, self.layers, strict=True):
            output.copy_(layer.run_experts(self.x, self.weights, self.ids))

    def in_context(self, mode: CUDAGraphMode) -> None:
        """`ModelCudaGraphManager.capture`'s `forward_fn` (vllm/v1/worker/gpu/cudagraph_utils.py)."""
        with set_forward_context(
            {"attention": object()}, self.worker.vllm_config, num_tokens=PADDED, cudagraph_runtime_mode=mode,
            is_padding=self.is_padding,
        ):  # fmt: skip
            self.run()

    def capture(self) -> Any:
        """Lets vLLM capture a decode step; returns what replays it."""
        config = self.worker.vllm_config
        config.compilation_config.cudagraph_capture_sizes = [PADDED]
        config.compilation_config.max_cudagraph_capture_size = PADDED
        manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, 1)
        manager.capture(lambda desc, warmup: self.in_context)
        (graph,) = manager.graphs.values()
        return graph.replay

    def served(self, launch: Any) -> torch.Tensor:
        """A step that the worker serves: outputs `[layers, tokens, hidden]`, and its routing taken in afterwards."""
        gpu_steps = self.worker.gpu_steps
        with gpu_steps.step(TOKENS, SimpleNamespace(requests=lambda: [("a", 5, 1)] * TOKENS), self.worker.predictor):
            launch()
        outputs = self.outputs[:, :TOKENS].clone()
        gpu_steps.routing._in_flight[-1][1][:] = range(len(self.layers))  # the others of this model are not run here
        gpu_steps.drain_finished(None)
        return outputs


@pytest.fixture
def as_if_capturing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: graph_recorder.Recorder.capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_recorder.Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph_recorder.capture)
    for name in ("graph_capture", "capture_pool"):
        monkeypatch.setattr(cudagraph_utils, name, lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(cudagraph_utils, "current_stream", lambda: None)
    monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)


@torch.inference_mode()  # as vLLM runs and captures a model
def replay_and_eager(worker: Any) -> list[tuple[bool, float]]:
    """Steps of other ids, replayed and run: whether all bits are equal, and the largest output."""
    steps = Steps(worker)
    replay = steps.capture()
    compared = []
    for _ in range(3):
        steps.draw()
        replayed = steps.served(replay)
        run = steps.served(lambda: steps.in_context(CUDAGraphMode.NONE))
        compared.append((torch.equal(replayed, run), run.abs().max().item()))
    return compared


@pytest.mark.parametrize("gating", [{}, GATED], ids=["all-kept", "gated"])
def test_replayed_steps_are_those_that_ran(as_on_gpu, interpreted, as_if_capturing, monkeypatch, gating):  # noqa: F811
    with Engine(TINY_MIXTRAL, CONFIG | gating, **ARGS) as engine:
        (compared,) = engine.llm.collective_rpc(replay_and_eager)
    assert all(equal and largest > 0 for equal, largest in compared), compared


def test_a_graph_of_the_dummy_path_ends_the_engine(as_on_gpu, interpreted, as_if_capturing, monkeypatch):  # noqa: F811
    """What was shipped once: the mode was asked, which runner V2 leaves at NONE while it captures."""
    monkeypatch.setattr(
        mapped_experts, "is_capturing", lambda: get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
    )
    recorded_no = pytest.raises(RoutingNotRecorded, match=r"MoE layers \[0, 1, 2, 3\] recorded no routing")
    with Engine(TINY_MIXTRAL, CONFIG, **ARGS) as engine, recorded_no:
        engine.llm.collective_rpc(lambda worker: worker.gpu_steps.give_back())  # or dummy steps would be the GPU's, too
        engine.llm.collective_rpc(replay_and_eager)


def test_steps_that_ask_the_host_are_not_captured(as_on_gpu, as_if_capturing):  # noqa: F811
    @torch.inference_mode()
    def capture(worker: Any) -> str:
        try:
            Steps(worker).capture()
        except RuntimeError as error:
            return str(error)
        return "captured"

    with Engine(TINY_MIXTRAL, CONFIG | {"decode": "host"}, **ARGS) as engine:
        (said,) = engine.llm.collective_rpc(capture)
    assert "cudagraph_mode=PIECEWISE" in said
