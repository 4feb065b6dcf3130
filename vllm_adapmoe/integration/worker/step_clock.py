"""Measures how long steps take on the device, without making the host wait for them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch


class StepClock:
    """Times steps, of which several may be in flight.

    On the CPU a step has run when its call returns, so a host clock is enough. On a GPU the call only launches it: an
    event is recorded on the compute stream before and after it, and both are read once the device has passed the
    second. The host only records and queries (CUDA Runtime API, "Event Management": `cudaEventElapsedTime` fails with
    `cudaErrorNotReady` for an incomplete event, and `cudaEventQuery` reports a never recorded one as complete, so
    events are recorded before they are queued here).

    Args:
        device: device that the steps run on.
        new_event: creates events like `torch.cuda.Event(enable_timing=True)`.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        self._on_host = device.type == "cpu"
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._begun: Any = None
        """First event, or host time, of the current step; None between steps."""
        self._flights: deque[tuple[Any, Any, Any]] = deque()
        """Launched steps: first and last event, or host times, and the argument of `stop`."""
        self._spare: list[Any] = []
        """Events for reuse; recording overwrites them."""

    def start(self) -> None:
        """Marks that a step is about to be launched; discards a previous one that was not stopped."""
        if self._begun is not None and not self._on_host:
            self._spare.append(self._begun)
        self._begun = self._mark()

    def stop(self, payload: Any) -> None:
        """Marks that the step has been launched; `finished` yields `about` with its time."""
        assert self._begun is not None
        self._flights.append((self._begun, self._mark(), payload))
        self._begun = None

    def finished(self) -> Iterator[tuple[float, Any]]:
        """Yields seconds and `about` of steps finished since the last call, oldest first."""
        while self._flights:
            first, last, payload = self._flights[0]
            if self._on_host:
                seconds = last - first
            elif last.query():  # which implies the first, recorded before it on the same stream
                seconds = first.elapsed_time(last) / 1000
                self._spare += [first, last]
            else:
                return
            self._flights.popleft()
            yield seconds, payload

    def _mark(self) -> Any:
        if self._on_host:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        return event
