"""How long steps take on the device, measured without making the host wait for them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch


class StepClock:
    """Times steps, of which several may be in flight.

    On the CPU a step has run when its call returns: a clock of the host does. On a GPU the call has only launched it:
    an event is recorded on the compute stream before it and one after it, and both are read when the device has passed
    the second. Recording and querying are the host's only part in it (CUDA Runtime API, "Event Management":
    `cudaEventElapsedTime` fails with `cudaErrorNotReady` for an event that has not completed, and `cudaEventQuery` says
    of one that was never recorded that it has, so an event is recorded before it is queued here).

    Args:
        device: where the steps run.
        new_event: makes what `torch.cuda.Event(enable_timing=True)` is.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        self._on_host = device.type == "cpu"
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._begun: Any = None
        """Of the step under way: its first event, or the host's time; None between steps."""
        self._flights: deque[tuple[Any, Any, Any]] = deque()
        """Of steps that were launched: first and last event, or times, and what `stop` was told."""
        self._spare: list[Any] = []
        """Events that nothing waits for; a record replaces what they held."""

    def start(self) -> None:
        """Marks that a step is about to be launched. One that was not stopped is forgotten."""
        if self._begun is not None and not self._on_host:
            self._spare.append(self._begun)
        self._begun = self._mark()

    def stop(self, about: Any) -> None:
        """Marks that the step has been launched; `about` comes back with its time."""
        assert self._begun is not None
        self._flights.append((self._begun, self._mark(), about))
        self._begun = None

    def finished(self) -> Iterator[tuple[float, Any]]:
        """Yields seconds, and what `stop` was told, of steps that have run and were not told yet, the oldest first."""
        while self._flights:
            first, last, about = self._flights[0]
            if self._on_host:
                seconds = last - first
            elif last.query():  # the first is before it on the same stream
                seconds = first.elapsed_time(last) / 1000
                self._spare += [first, last]
            else:
                return
            self._flights.popleft()
            yield seconds, about

    def _mark(self) -> Any:
        if self._on_host:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        return event
