"""What the device counts and records is read at most two steps later, without waiting: on a played CUDA runtime.

How far steps overlap, by vLLM 0.32: `EngineCore.step_with_batch_queue` launches a step, and once two of them are in its
queue (`VllmConfig.max_concurrent_batches`, with asynchronous scheduling and without pipeline stages, which the plugin
refuses) waits for the output of the older one before it launches another. So when step N + 2 begins, step N + 1 may not
even have begun to run, but the output of step N is there. It was copied on a stream of its own, behind all that step N
had launched (`AsyncOutput`, vllm/v1/worker/gpu/async_utils.py), so copies of counters and routing are there as well.
"""

from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.cache.fake_cuda import FakeCuda
from tests.cache.test_cuda_order import EXPERTS, LAYERS, TOP_K, Worker
from vllm_adapmoe.cache import transfer
from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.device import fetch
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.deferred import DeferredRouting, FinishedStep
from vllm_adapmoe.device.residency import COUNTERS
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.layers.gates import Gating
from vllm_adapmoe.integration.worker.current_step import LaunchedStep, Requests
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor
from vllm_adapmoe.integration.worker.gpu_steps import GpuSteps
from vllm_adapmoe.integration.worker.worker_stats import StepStats
from vllm_adapmoe.prefetch.request_experts import RequestExperts
from vllm_adapmoe.scheduling.counters import StepCounters

IN_QUEUE = 2
"""`max_concurrent_batches`."""
NAMES = ("first", "second")
"""Requests, each with one token in every step."""
DECODE_STEPS = 6
"""Before a step of the host, and after it."""
SEED = 4
"""Of a worker whose store is page-locked, with few slots."""
PROMPT = 1000
"""Tokens of a step that the host decides."""
Step = tuple[Requests, Any]
"""Requests of a step that the device decides, and its ids as lists, `[layers, tokens, top_k]`."""


class Predictor(ExpertPredictor):
    """Predicts nothing; keeps what it is told of steps that ran without the host."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.cache, self.failed, self.trace, self.recorder = cuda, None, False, None, None
        self._unwritten = deque()
        self.experts = RequestExperts(LAYERS, EXPERTS)
        self.recorded: list[Step] = []

    def record_finished(self, step: LaunchedStep, ids: np.ndarray) -> None:
        self.cuda.touch(torch.from_numpy(ids))
        self.recorded.append((step.requests, ids.tolist()))
        super().record_finished(step, ids)


class Engine:
    """The queue of `EngineCore`, and of a worker's `execute_model` what is about steps that the device decides.

    Args:
        cuda: the device.
        ahead: chance that it has run something whenever the host calls it; 0: runs only what the host waits for.
    """

    def __init__(self, cuda: FakeCuda, ahead: float) -> None:
        cuda.schedule.eager = ahead
        self.cuda, self.worker = cuda, Worker(cuda, SEED)
        decode = self.worker.decode
        assert decode is not None
        self.decode, self.cache = decode, self.worker.cache
        self.gating = Gating(GatingPlan(rule="token", sensitivity=[1.0] * LAYERS))
        layers: Any = [
            SimpleNamespace(gating=gate, probe=None, local_num_experts=EXPERTS) for gate in self.gating.layers
        ]
        self.steps = GpuSteps(layers, self.cache, decode, decode.routing)
        self.stats = StepStats(self.cache, layers, None)
        self.predictor = Predictor(cuda)
        self.experts = self.predictor.experts
        self.copies = torch.cuda.Stream()
        self.queue: deque[Any] = deque()
        self.launched: list[Step] = []
        self.base = np.zeros(0, np.int64)
        self.on_device: list[tuple[int, list[int]]] = []
        """Steps, and what the device has counted when they had run."""
        self.reported: list[StepCounters] = []
        self.lateness = 0
        """Steps that were launched and not yet counted when another one began, at most."""

    def decode_step(self) -> None:
        """Runs a step that the device decides."""
        if not self.decode.owns:
            self.decode.take()  # waits for the device, as it should
            self.base = self.counted()
            self.on_device.append((len(self.launched), [*self.base, *self.cache.controller.layer_residents()]))
        waits, random = self.cuda.waits, self.worker.random
        self.drain()
        ids = np.array([[random.sample(range(EXPERTS), TOP_K) for _ in NAMES] for _ in range(LAYERS)], np.int32)
        ids[random.randrange(LAYERS), random.randrange(len(NAMES)), 1] = -1  # gating drops it
        requests = [(name, len(self.launched), 1) for name in NAMES]
        current: Any = SimpleNamespace(requests=lambda: requests)
        self.steps.prepare(len(NAMES), self.predictor)
        with self.steps.step(len(NAMES), current, self.predictor):
            for layer in range(LAYERS):
                self.worker.launch_layer(self.decode, layer, ids[layer])
            self.launched.append((requests, ids.tolist()))
            self.note_counters(len(self.launched))
        self.end_step()
        assert self.cuda.waits == waits, "the host waits for the device"
        self.wait_for_output()

    def host_step(self) -> None:
        """Runs a step that the host decides."""
        self.take_back()
        self.worker.fetched()
        self.end_step()
        self.wait_for_output()

    def take_back(self) -> None:
        """Begins a step that the host decides, which waits for the device."""
        self.drain()
        self.steps.prepare(PROMPT, self.predictor)
        # Not residents: the host has evicted some, to have slots for prefetches of its own.
        assert self.counted().tolist() == self.on_device[-1][1][:-LAYERS], "all counters come with the cache"

    def drain(self) -> None:
        """Begins a step: checks that all has been counted but what may not have run yet."""
        launched, recorded = self.launched, self.predictor.recorded
        self.steps.drain_finished(self.predictor)
        may_run = IN_QUEUE - 1
        assert len(launched) - len(recorded) <= may_run, "routing is late"
        assert recorded == launched[: len(recorded)], "routing of every step, in order"
        if self.decode.owns:
            counted = [steps for steps, counters in self.on_device if counters == self.seen()]
            assert counted and len(launched) - counted[-1] <= may_run, "counters are late"
        self.lateness = max(self.lateness, len(launched) - len(recorded))
        kept = np.array([ids for _, ids in recorded]) >= 0
        gates = [gate.stats for gate in self.gating.layers]
        assert sum(gate.gated_tokens for gate in gates) == len(recorded) * LAYERS * len(NAMES)
        assert sum(gate.kept_experts for gate in gates) == kept.sum()
        if recorded:
            self.check_request_experts(*recorded[-1])

    def check_request_experts(self, requests: Requests, ids: Sequence[Any]) -> None:
        """Checks that the scheduler is told of the experts that each request has used last."""
        for row, (name, _, _) in enumerate(requests):
            for layer, chances in enumerate(self.experts.chances[name]):
                assert set(np.flatnonzero(chances)) == set(ids[layer][row]) - {-1}

    def end_step(self) -> None:
        """`sample_tokens`, and `AsyncOutput`."""
        self.reported.append(self.stats.step(self.gating) or StepCounters())
        tokens = self.cuda.device(torch.zeros(1))
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            torch.empty(1, pin_memory=True).copy_(tokens, non_blocking=True)
            output = torch.cuda.Event()
            output.record()
        self.queue.append(output)

    def wait_for_output(self) -> None:
        if len(self.queue) == IN_QUEUE:
            self.queue.popleft().synchronize()

    # Counters: prefetches, those used, those wasted, hits and misses of each layer; then residents of each layer

    def counted(self) -> np.ndarray:
        stats, controller = self.cache.stats, self.cache.controller
        layers = zip(controller.layer_hits, controller.layer_misses, strict=True)
        pool = [stats.prefetches, stats.prefetch_hits, stats.prefetches_wasted]
        return np.array([*pool, *(number for layer in layers for number in layer)])

    def seen(self) -> list[int]:
        """Returns what the host knows."""
        return [*self.counted().tolist(), *self.cache.controller.layer_residents()]

    def note_counters(self, steps: int) -> None:
        """Launches a kernel that notes the device's own counters, behind a number of steps."""
        pools, base = self.decode.pools, self.base

        def note() -> None:
            counters = np.delete(sum(pool.counters.numpy() for pool in pools), len(COUNTERS) - 1)
            residents = sum(pool.count.numpy() for pool in pools)
            self.on_device.append((steps, [*(base + counters).tolist(), *residents.tolist()]))

        self.cuda.launch([tensor for pool in pools for tensor in (pool.counters, pool.count)], [], note)


def run(ahead: float, plant: Callable[[pytest.MonkeyPatch], None] = lambda patch: None) -> Engine:
    """Runs decode steps, a step of the host, and more decode steps; in the end, the host has the cache again."""
    cuda = FakeCuda(SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "threading", cuda.schedule)
        patch.setattr(fetch, "PROGRAMS", 1)
        plant(patch)
        cuda.install(patch)
        try:
            engine = Engine(cuda, ahead)
            for _ in range(DECODE_STEPS):
                engine.decode_step()
            engine.host_step()
            for _ in range(DECODE_STEPS):
                engine.decode_step()
            engine.take_back()
            engine.drain()
            engine.end_step()
            engine.cache.close()
        finally:
            cuda.schedule.end()
    assert cuda.faults == []
    return engine


@pytest.mark.parametrize("ahead", [0.0, 0.3, 0.6])
def test_two_steps_late_and_never_waited_for(ahead):
    """Counters, gates, routing and the requests' experts; in the end, all that the device has counted."""
    engine = run(ahead)
    assert len(engine.launched) == len(engine.predictor.recorded) == 2 * DECODE_STEPS
    stats = engine.cache.stats
    assert min(stats.hits, stats.misses, stats.prefetch_hits, stats.prefetches_wasted) > 0
    for name in ("hits", "misses", "prefetches", "prefetch_hits", "prefetches_wasted", "fetched_bytes"):
        assert sum(getattr(step, name) for step in engine.reported) == getattr(stats, name), name
    kept = (np.array([ids for _, ids in engine.launched]) >= 0).sum()
    assert sum(step.kept_experts for step in engine.reported) == kept
    assert ahead or engine.lateness == IN_QUEUE - 1, "a device that is behind lets the host wait for its numbers"


def never_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceDecode, "count", lambda decode: None)


def every_other_time(patch: pytest.MonkeyPatch) -> None:
    calls = []
    finished = DeferredRouting.finished

    def rarely(routing: DeferredRouting) -> Sequence[FinishedStep]:
        calls.append(None)
        return list(finished(routing)) if len(calls) % 2 else []

    patch.setattr(DeferredRouting, "finished", rarely)


def waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostCopy, "arrived", property(lambda copy: copy.wait() or True))


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (never_counted, "counters are late"),
        (every_other_time, "routing is late"),
        (waited_for, "the host waits for the device"),
    ],
)
def test_planted_faults_are_found(plant, found):
    with pytest.raises(AssertionError, match=found):
        run(0.0, plant)
