"""PyTorch's CUDA, played on host memory: streams, events, copies and kernels whose order is checked.

Written from CUDA's documentation, of which it plays what the cache uses:

- *CUDA Runtime API, Stream Management*: what is given to a stream runs in order, and beside other streams.
  `cudaStreamWaitEvent` holds up what is given to the stream afterwards, by what the event had captured at the call.
- *CUDA Runtime API, Event Management*, `cudaEventRecord`: an event captures what its stream holds at the call. "Before
  the first call to cudaEventRecord(), an event represents an empty set of work": waiting for it is over at once. No
  program means that, so it is a fault here.
- *CUDA Runtime API, API synchronization behavior*: copies between page-locked memory and the device return at once.
- *CUDA Programming Guide, CUDA Graphs, prohibited and unhandled operations*, and `cudaThreadExchangeStreamCaptureMode`
  on `cudaStreamCaptureModeGlobal`, PyTorch's default: while a thread captures, other threads may not make calls that
  are potentially unsafe. Which those are is left open (queries of events have been seen to be, and allocations), so
  every call of another thread is a fault here. What was recorded in a capture cannot be waited for outside it.
- *PyTorch, `ATen/core/CachingHostAllocator.h`*: page-locked memory that is freed is given out again when the copies
  that used it have run, so no program has to wait before it lets go of it. Here no memory is given out twice: only
  what a program itself uses again can be used too early. Memory of `torch.zeros` and the like is filled by a kernel of
  the current stream.

Two things are looked at. *Order*: every operation knows which others are sure to have run before it (vector clocks over
the streams and the host); two that touch the same bytes, one of them writing, must be ordered, whatever the time at
which they ran. Python's threads count as one here, for each of its steps is seen by all of them. *Values*: operations
run when a random clock says so, as late as possible, and kernels may look at what they read.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.cache.schedule import Schedule

Clock = dict[int, int]
"""Of each stream, how many of its operations are sure to have run."""


def join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


@dataclass
class Operation:
    """Of a stream, in its order."""

    number: int
    run: Callable[[], None] | None
    after: "tuple[Stream, int] | None" = None
    """An operation of another stream that must have run."""


@dataclass
class Access:
    """Of some bytes, by an operation."""

    start: int
    stop: int
    write: bool
    stream: int
    number: int
    what: str


@dataclass
class Block:
    """Memory that was allocated at once."""

    start: int
    stop: int
    kind: str
    """`device`, or `pinned`."""
    accesses: list[Access] = field(default_factory=list)


class Stream:
    """`torch.cuda.Stream`."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda = cuda
        self.id = len(cuda.streams)
        cuda.streams.append(self)
        self.clock: Clock = {}
        self.queue: deque[Operation] = deque()
        self.given = self.done = 0
        """Operations."""
        self.times: list[float] = []
        """When each ended."""

    def wait_event(self, event: "Event") -> None:
        self.cuda.call("cudaStreamWaitEvent")
        if event.recorded is None:
            self.cuda.fault("an event is waited for before it is recorded")
            return
        if event.captured and self is not self.cuda.capturing:
            self.cuda.fault("an event of a capture is waited for outside it")
            return
        join(self.clock, event.clock)
        self.cuda.enqueue(self, [], [], None, "wait", after=event.recorded)

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.cuda.call("cudaStreamSynchronize", capturable=False)
        self.cuda.wait(self, self.given, self.clock)


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, cuda: "FakeCuda", enable_timing: bool = False) -> None:
        self.cuda, self.enable_timing = cuda, enable_timing
        self.recorded: tuple[Stream, int] | None = None
        self.captured = False
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        self.cuda.call("cudaEventRecord")
        self.recorded, self.captured = (stream, stream.given), stream is self.cuda.capturing
        self.clock = dict(stream.clock)
        self.recorded_at = self.cuda.now

    def query(self) -> bool:
        self.cuda.call("cudaEventQuery", capturable=False)
        if self.recorded is None:
            self.cuda.fault("an event is queried before it is recorded")
            return True
        stream, number = self.recorded
        if stream.done < number:
            return False
        join(self.cuda.host, self.clock)
        return True

    def synchronize(self) -> None:
        self.cuda.call("cudaEventSynchronize", capturable=False)
        if self.recorded is None:
            self.cuda.fault("an event is waited for before it is recorded")
            return
        self.cuda.wait(*self.recorded, self.clock)

    def elapsed_time(self, end: "Event") -> float:
        """Operations run in between, as milliseconds. `cudaEventElapsedTime` wants both events to have ended."""
        self.cuda.call("cudaEventElapsedTime", capturable=False)
        for event in (self, end):
            if not event.enable_timing:
                self.cuda.fault("an event without timing is asked for its time")
            elif event.recorded is None or event.recorded[0].done < event.recorded[1]:
                self.cuda.fault("an event is asked for its time before it has ended")
                return 0.0
        return end.time - self.time

    @property
    def time(self) -> float:
        """When the device passed it: an idle stream does at once."""
        assert self.recorded is not None
        stream, number = self.recorded
        return max(self.recorded_at, stream.times[number - 1] if number else 0.0)


class FakeCuda:
    """One device, and what PyTorch offers of it.

    Args:
        seed: of the schedule.
    """

    def __init__(self, seed: int) -> None:
        self.schedule = Schedule(seed, self.advance, eager=(0.6, 0.3, 0.05)[seed % 3])
        self.faults: list[str] = []
        self.calls = self.waits = 0
        """Calls, and how often the host has waited for the device."""
        self.now = 0.0
        """Operations that the device has run."""
        self.host: Clock = {}
        """What the host is sure of."""
        self.streams: list[Stream] = []
        self.default = Stream(self)
        self.capturing: Stream | None = None
        self._capturer: object = None
        self._current = threading.local()
        self._blocks: list[Block] = []
        self._starts: list[int] = []
        self._memory: list[torch.Tensor] = []
        """Kept, so that an address says what it is."""

    def fault(self, what: str) -> None:
        self.faults.append(what)

    # Calls

    def call(self, name: str, capturable: bool = True) -> None:
        """A call by the running thread; `capturable`: it may capture meanwhile."""
        self.schedule.pause()
        self.calls += 1
        if self.capturing is None:
            return
        if self.schedule.running is not self._capturer:
            self.fault(f"a call from another thread during a capture ({name})")
        elif not capturable:
            self.fault(f"{name} during a capture")

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def wait(self, stream: Stream, number: int, clock: Clock) -> None:
        self.waits += 1
        self.schedule.wait_until(lambda: stream.done >= number, f"operation {number} of stream {stream.id}")
        join(self.host, clock)

    def synchronize(self, device: Any = None) -> None:
        self.call("cudaDeviceSynchronize", capturable=False)
        for stream in list(self.streams):
            self.wait(stream, stream.given, stream.clock)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """`torch.cuda.graph`: what this thread launches is captured, and runs when the graph is replayed: not here."""
        self.synchronize()
        self.capturing, self._capturer = Stream(self), self.schedule.running
        try:
            with self.stream(self.capturing):
                yield
        finally:
            self.capturing = None

    def launch(
        self,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        run: Callable[[], None] | None = None,
        what: str = "kernel",
    ) -> None:
        """A kernel on the current stream that reads and writes tensors; `run`: what it does when it runs."""
        self.call("cudaLaunchKernel")
        self.enqueue(self.current_stream(), reads, writes, run, what)

    # What runs on the device

    def enqueue(
        self,
        stream: Stream,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        run: Callable[[], None] | None,
        what: str,
        after: tuple[Stream, int] | None = None,
    ) -> None:
        if stream is self.capturing:
            return
        join(stream.clock, self.host)
        stream.given += 1
        stream.clock[stream.id] = stream.given
        for tensors, write in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._access(tensor, write, what, stream.clock, (stream.id, stream.given))
        stream.queue.append(Operation(stream.given, run, after))

    def advance(self) -> bool:
        """Runs one operation that can run; returns whether there was one."""
        able = [
            stream
            for stream in self.streams
            if stream.queue and ((after := stream.queue[0].after) is None or after[0].done >= after[1])
        ]
        if not able:
            return False
        stream = self.schedule.random.choice(able)
        operation = stream.queue.popleft()
        if operation.run is not None:
            operation.run()
        stream.done = operation.number
        self.now += 1.0
        stream.times.append(self.now)
        return True

    # Memory

    def _allocate(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        start = tensor.data_ptr()
        index = bisect_right(self._starts, start)
        self._starts.insert(index, start)
        self._blocks.insert(index, Block(start, start + tensor.numel() * tensor.element_size(), kind))
        self._memory.append(tensor)
        return tensor

    def _block(self, address: int) -> Block | None:
        index = bisect_right(self._starts, address) - 1
        block = self._blocks[index] if index >= 0 else None
        return block if block is not None and address < block.stop else None

    def kind(self, tensor: torch.Tensor) -> str:
        """`device`, `pinned`, or `host`."""
        block = self._block(tensor.data_ptr())
        return "host" if block is None else block.kind

    def device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor as memory of the device, filled by a kernel of the current stream."""
        self.launch([], [self._allocate(tensor, "device")], what="fill")
        return tensor

    def page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory, page-locked from here on (`cudaHostRegister`)."""
        return self._allocate(tensor, "pinned")

    def touch(self, tensor: torch.Tensor, write: bool = False, what: str = "the host") -> None:
        """The host reads or writes memory, now."""
        self._access(tensor, write, what, self.host, None)

    def _access(self, tensor: torch.Tensor, write: bool, what: str, clock: Clock, by: tuple[int, int] | None) -> None:
        for start, stop in extents(tensor):
            block = self._block(start)
            if block is None:
                continue
            left = []
            for old in block.accesses:
                if old.number <= self.host.get(old.stream, 0):
                    continue  # whatever comes knows of it
                left.append(old)
                overlap = old.start < stop and start < old.stop and (old.write or write)
                if overlap and old.number > clock.get(old.stream, 0):
                    self.fault(
                        f"{what} {'writes' if write else 'reads'} {block.kind} memory that an unordered "
                        f"{old.what} {'writes' if old.write else 'reads'}"
                    )
            if by is not None:
                left.append(Access(start, stop, write, *by, what))
            block.accesses = left

    # What stands in for PyTorch

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Takes the place of PyTorch's CUDA, for code that is run under the schedule."""
        empty, full, zeros = torch.empty, torch.full, torch.zeros
        copy_, fill_, to = torch.Tensor.copy_, torch.Tensor.fill_, torch.Tensor.to

        def on_device(options: dict[str, Any]) -> bool:
            return options.get("device") is not None and torch.device(options["device"]).type == "cuda"

        def allocating(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def wrapped(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
                if on_device(options):
                    return self.device(allocate(*args, **options | {"device": "cpu"}))
                if pin_memory:
                    self.call("cudaHostAlloc", capturable=False)
                    return self._allocate(allocate(*args, **options), "pinned")
                return allocate(*args, **options)

            return wrapped

        def copying(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            kinds = {self.kind(into), self.kind(source)}
            if "device" not in kinds:  # within the host
                self.touch(into, write=True)
                return copy_(into, source)
            waits = "host" in kinds or (not non_blocking and kinds != {"device"})
            self.call("cudaMemcpy" if waits else "cudaMemcpyAsync", capturable=not waits)
            stream = self.current_stream()
            self.enqueue(stream, [source], [into], lambda: copy_(into, source), "copy")
            if waits:
                self.wait(stream, stream.given, stream.clock)
            return into

        def filling(into: torch.Tensor, value: Any) -> torch.Tensor:
            if self.kind(into) != "device":
                self.touch(into, write=True)
                return fill_(into, value)
            self.launch([], [into], lambda: fill_(into, value))
            return into

        def moving(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
                return copying(self.device(empty(tensor.shape, dtype=tensor.dtype)), tensor)
            return to(tensor, *args, **options)

        def pinning(tensor: torch.Tensor) -> torch.Tensor:
            return copying(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), tensor)

        def new_stream(device: Any = None) -> Stream:
            self.call("cudaStreamCreate")
            return Stream(self)

        for name, allocate in (("empty", empty), ("full", full), ("zeros", zeros)):
            patch.setattr(torch, name, allocating(allocate))
        patch.setattr(torch.Tensor, "copy_", copying)
        patch.setattr(torch.Tensor, "fill_", filling)
        patch.setattr(torch.Tensor, "to", moving)
        patch.setattr(torch.Tensor, "pin_memory", pinning)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: self.kind(tensor) == "device"))
        patch.setattr(torch.cuda, "Stream", new_stream)
        patch.setattr(torch.cuda, "Event", lambda **options: Event(self, **options))
        patch.setattr(torch.cuda, "current_stream", self.current_stream)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "synchronize", self.synchronize)


def extents(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First and last address of each contiguous part."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        yield tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        return
    for part in tensor:
        yield from extents(part)
