"""Times of steps against a made-up device: events as CUDA's documentation has them, on a clock of the test's own."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.integration.worker.current_step import CurrentStep
from vllm_adapmoe.integration.worker.step_clock import StepClock
from vllm_adapmoe.integration.worker.worker import ExpertCacheWorker
from vllm_adapmoe.integration.worker.worker_stats import CounterDelta
from vllm_adapmoe.scheduling.report import StepTimes

GPU = torch.device("cuda", 0)


class NotReady(RuntimeError):
    """`cudaErrorNotReady`."""


class Stream:
    """Runs what was launched, one after the other, when the test lets it; the host never waits."""

    def __init__(self) -> None:
        self.now = 0.0
        """Milliseconds, of the device."""
        self.queue: deque[Callable[[], None]] = deque()

    def launch(self, milliseconds: float) -> None:
        def run() -> None:
            self.now += milliseconds

        self.queue.append(run)

    def run(self, count: int = 10**6) -> None:
        while self.queue and count:
            self.queue.popleft()()
            count -= 1


class Event:
    """CUDA Runtime API, section "Event Management": `cudaEventRecord`, `cudaEventQuery`, `cudaEventElapsedTime`."""

    made = 0

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.recorded = False
        self.latest = 0
        self.completed_at: float | None = None
        Event.made += 1

    def record(self) -> None:
        """Captures what was queued up to here; a later record replaces an earlier one."""
        self.recorded, self.completed_at = True, None
        self.latest += 1
        number = self.latest

        def complete() -> None:
            if number == self.latest:
                self.completed_at = self.stream.now

        self.stream.queue.append(complete)

    def query(self) -> bool:
        """Also true of an event that was never recorded."""
        return not self.recorded or self.completed_at is not None

    def elapsed_time(self, end: "Event") -> float:
        if not (self.recorded and end.recorded):
            raise RuntimeError("cudaErrorInvalidResourceHandle")
        if self.completed_at is None or end.completed_at is None:
            raise NotReady("cudaErrorNotReady")
        return end.completed_at - self.completed_at


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def clock(stream: Stream) -> StepClock:
    return StepClock(GPU, lambda: Event(stream))


def launch(clock: StepClock, stream: Stream, milliseconds: float, about: object) -> None:
    clock.start()
    stream.launch(milliseconds)
    clock.stop(about)


def test_a_step_takes_what_the_device_takes_and_is_told_when_it_has_run(clock, stream):
    launch(clock, stream, 30, "a")
    assert list(clock.finished()) == []  # launched in no time, and not run
    stream.run()
    assert list(clock.finished()) == [(pytest.approx(0.030), "a")]
    assert list(clock.finished()) == []


def test_two_steps_in_flight_are_told_apart(clock, stream):
    launch(clock, stream, 30, "a")
    launch(clock, stream, 50, "b")
    stream.run(3)  # first event of a, its kernels, its last event
    assert list(clock.finished()) == [(pytest.approx(0.030), "a")]
    launch(clock, stream, 20, "c")
    stream.run(2)  # b runs, and is not over
    assert list(clock.finished()) == []
    stream.run()
    assert list(clock.finished()) == [(pytest.approx(0.050), "b"), (pytest.approx(0.020), "c")]


def test_a_step_begins_when_the_one_before_it_has_run(clock, stream):
    """The first event completes when the device gets to it, not when the host records it."""
    launch(clock, stream, 100, "a")
    launch(clock, stream, 1, "b")
    stream.run()
    assert [seconds for seconds, _ in clock.finished()] == [pytest.approx(0.1), pytest.approx(0.001)]


def test_a_step_that_failed_is_forgotten(clock, stream):
    clock.start()
    stream.launch(500)
    launch(clock, stream, 10, "next")
    stream.run()
    assert list(clock.finished()) == [(pytest.approx(0.010), "next")]


def test_events_are_used_again(clock, stream):
    Event.made = 0
    for number in range(50):
        launch(clock, stream, number, number)
        if number % 2:
            stream.run()
            assert [about for _, about in clock.finished()] == [number - 1, number]
    assert Event.made == 4


@pytest.mark.parametrize("fault", ["no query", "reuse at once"])
def test_the_made_up_device_finds_faults(stream, fault):
    class Faulty(StepClock):
        def finished(self):
            first, last, about = self._flights.popleft()
            yield first.elapsed_time(last) / 1000, about

    clock = (Faulty if fault == "no query" else StepClock)(GPU, lambda: Event(stream))
    launch(clock, stream, 30, "a")
    if fault == "no query":
        with pytest.raises(NotReady):
            list(clock.finished())
        return
    clock._spare += clock._flights[0][:2]  # while the step is in flight
    launch(clock, stream, 50, "b")
    stream.run()
    assert [seconds for seconds, _ in clock.finished()] != [pytest.approx(0.030), pytest.approx(0.050)]


def test_on_the_cpu_a_step_has_run_when_it_was_launched(monkeypatch):
    times = iter([1.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr("vllm_adapmoe.integration.worker.step_clock.time.perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    for about, seconds in [("a", 0.5), ("b", 0.25)]:
        clock.start()
        clock.stop(about)
        assert list(clock.finished()) == [(seconds, about)]


def test_a_worker_reports_what_steps_took_on_the_device_with_later_steps(clock, stream, monkeypatch):
    """Two steps in flight, as under async scheduling; a step that is launched takes the host no time."""
    monkeypatch.setattr(Worker, "execute_model", lambda worker, output: stream.launch(output.milliseconds))
    worker: Any = object.__new__(ExpertCacheWorker)
    stats = SimpleNamespace(stall_seconds=0.0)
    vars(worker).update(
        expert_cache=SimpleNamespace(
            update_stats=lambda: stats, controller=SimpleNamespace(device_stall_seconds=0.0)
        ),
        current_step=CurrentStep(None, False), _clock=clock, _since=CounterDelta(), _config=AdapMoEConfig(),
    )  # fmt: skip

    def run(milliseconds: float, rows: int, stalled: float) -> list[StepTimes]:
        stats.stall_seconds += stalled
        output = SimpleNamespace(
            num_scheduled_tokens={"a": rows}, total_num_scheduled_tokens=rows, milliseconds=milliseconds,
            scheduled_spec_decode_tokens={}, finished_req_ids=set(),
        )  # fmt: skip
        worker.execute_model(output)
        return list(worker._step_times)

    assert run(30, 7, 0.02) == []
    assert run(50, 1, 0.01) == []
    stream.run()
    first, second = run(5, 1, 0.0)
    assert first == StepTimes(pytest.approx(0.030), pytest.approx(0.02), prefill=True)
    assert second == StepTimes(pytest.approx(0.050), pytest.approx(0.01), prefill=False)
