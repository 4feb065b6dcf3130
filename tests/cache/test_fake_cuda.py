"""What the played CUDA runtime says of programs whose faults are known."""

from collections.abc import Iterator

import pytest
import torch

from tests.cache.fake_cuda import FakeCuda, Stream
from tests.cache.schedule import Deadlock

DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=range(3))
def cuda(request, monkeypatch) -> Iterator[FakeCuda]:
    """Time passes often, sometimes, seldom."""
    cuda = FakeCuda(request.param)
    cuda.install(monkeypatch)
    yield cuda
    cuda.schedule.end()


def launch(cuda: FakeCuda, stream: Stream, tensor: torch.Tensor) -> None:
    with torch.cuda.stream(stream):
        cuda.launch([], [tensor])


def test_an_event_stands_for_nothing_before_it_is_recorded(cuda):
    assert torch.cuda.Event().query(), "and no error: cudaEventRecord, 'an event represents an empty set of work'"
    assert cuda.faults == ["an event is queried before it is recorded"]


def test_writes_on_two_streams_need_an_event_between_them(cuda):
    memory, first, second = torch.zeros(8, device=DEVICE), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    launch(cuda, first, memory[:4])
    launch(cuda, second, memory[4:])
    assert cuda.faults == [], "they do not touch the same bytes"
    event = torch.cuda.Event()
    event.record(first)
    second.wait_event(event)
    launch(cuda, second, memory[:4])
    assert cuda.faults == []
    launch(cuda, first, memory[:4])
    assert cuda.faults == ["kernel writes device memory that an unordered kernel writes"]


def test_a_wait_is_for_what_the_event_had_captured(cuda):
    """CudaStreamWaitEvent: "not affected by later calls to cudaEventRecord()"."""
    memory, first, second = torch.zeros(8, device=DEVICE), torch.cuda.Stream(), torch.cuda.Stream()
    event = torch.cuda.Event()
    event.record(first)
    second.wait_event(event)
    launch(cuda, first, memory)
    event.record(first)
    cuda.faults.clear()  # the zeros are not waited for
    launch(cuda, second, memory)
    assert "kernel writes device memory that an unordered kernel writes" in cuda.faults


def test_a_copy_takes_its_time(cuda):
    source, into = torch.zeros(4, pin_memory=True), torch.full((4,), 7.0, device=DEVICE)
    copy = torch.empty(4, pin_memory=True).copy_(into, non_blocking=True)
    into.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    while not event.query():
        pass
    assert copy.tolist() == [7.0] * 4 and into.tolist() == [0.0] * 4
    source.copy_(torch.ones(4))
    assert cuda.faults == []


def test_pinned_memory_may_not_change_under_a_copy(cuda):
    source, into = torch.empty(4, pin_memory=True), torch.zeros(4, device=DEVICE)
    into.copy_(source, non_blocking=True)
    source.copy_(torch.ones(4))
    assert cuda.faults == ["the host writes pinned memory that an unordered copy reads"]


def test_what_a_capture_forbids(cuda):
    with cuda.capture():
        event = torch.cuda.Event()
        event.record()
        event.query()
    other = torch.cuda.Stream()
    other.wait_event(event)
    assert cuda.faults == ["cudaEventQuery during a capture", "an event of a capture is waited for outside it"]


def test_a_wait_without_end_is_seen():
    cuda = FakeCuda(0)
    lock = cuda.schedule.Lock()
    condition = cuda.schedule.Condition(lock)

    def reader() -> None:
        with condition:
            condition.wait()

    thread = cuda.schedule.Thread(reader, "reader", True)
    thread.start()
    with pytest.raises(Deadlock, match="asks: the end of reader, reader: a condition"):
        thread.join()
    cuda.schedule.end()


def test_a_seed_is_one_order():
    def order(seed: int) -> list[int]:
        cuda, seen = FakeCuda(seed), []

        def reader(number: int) -> None:
            for _ in range(20):
                seen.append(number)
                cuda.schedule.pause()

        threads = [cuda.schedule.Thread(lambda number=number: reader(number), str(number), True) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cuda.schedule.end()
        return seen

    assert order(1) == order(1) != order(2)
