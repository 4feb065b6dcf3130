"""PartTimer: what each part of one thread's work costs by a clock, without the parts within it."""

import threading
from collections.abc import Callable, Collection, Iterator
from functools import wraps
from inspect import isgeneratorfunction
from statistics import median
from typing import Any

from vllm_adapmoe.integration.measure.thread_clock import Clock

CALLS, REPEATS = 500, 21
"""Empty parts that a clock's own cost is measured on, and how often."""


class _Span:
    """A function in progress: its part, and the cost and number of the functions timed within it."""

    __slots__ = ("nested", "part", "within")

    def __init__(self, part: str) -> None:
        self.part, self.within, self.nested = part, 0, 0


class PartTimer:
    """Sums the cost of functions by the part that they belong to, in the thread that started the clock.

    A function called within another counts for its own part alone. What the timer itself costs is measured on empty
    functions and subtracted.
    """

    def __init__(self) -> None:
        self.clock: Clock | None = None
        """Clock of the measurement in progress; None: nothing is measured."""
        self._parts: Collection[str] = ()
        self._thread = 0
        self._open: list[_Span] = []
        self._cost: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._nested: dict[str, int] = {}
        self._inside = self._around = 0.0
        """What one measurement costs the part itself, and the part around it."""

    def start(self, clock: Clock, parts: Collection[str]) -> None:
        """Starts to measure the calling thread; functions of other than the given parts count for the part around."""
        self.clock, self._thread, self._parts = clock, threading.get_ident(), {"inner", "with", "without"}
        self._inside = self._around = 0.0
        self._inside, self._around = self._own_cost()
        self._parts = frozenset(parts)
        self.take()

    def stop(self) -> None:
        """Stops measuring; wrapped functions run on without a clock."""
        self.clock = None

    def take(self) -> dict[str, float]:
        """Returns the cost of each part since the last call, in the clock's unit."""
        taken = {
            part: cost - self._calls[part] * self._inside - self._nested.get(part, 0) * self._around
            for part, cost in self._cost.items()
        }
        self._cost, self._calls, self._nested = {}, {}, {}
        return taken

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function, or a generator function, so that its cost counts for `part`."""
        if isgeneratorfunction(function):

            @wraps(function)
            def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
                proceed = self.timed(part, function(*args, **kwargs).__next__)
                while True:
                    try:
                        item = proceed()
                    except StopIteration:
                        return
                    yield item

            return iterate

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            clock = self.clock
            if clock is None or part not in self._parts or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            span = _Span(part)
            self._open.append(span)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = clock() - start
                self._open.pop()
                self._cost[part] = self._cost.get(part, 0) + elapsed - span.within
                self._calls[part] = self._calls.get(part, 0) + 1
                self._nested[part] = self._nested.get(part, 0) + span.nested
                if self._open:
                    self._open[-1].within += elapsed
                    self._open[-1].nested += 1

        return run

    def _own_cost(self) -> tuple[float, float]:
        def nothing() -> None:
            pass

        def repeat(function: Callable[[], None]) -> None:
            for _ in range(CALLS):
                function()

        inner = self.timed("inner", nothing)
        with_parts, without = self.timed("with", repeat), self.timed("without", repeat)
        costs = []
        for _ in range(REPEATS):
            with_parts(inner)
            without(nothing)
            costs.append(self.take())
        inside = median(cost["inner"] for cost in costs) / CALLS
        around = median(cost["with"] - cost["without"] for cost in costs) / CALLS
        return inside, around
