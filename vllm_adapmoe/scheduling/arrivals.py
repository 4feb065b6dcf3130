"""How fast prompts come that could begin to run."""

import math

from vllm_adapmoe.scheduling.prices import Mean


class Arrivals:
    """Mean time between two prompts: of the last ten or so, counted when they come, or when a seat becomes free."""

    def __init__(self) -> None:
        self._gap = Mean()
        self._last = 0.0
        self._count: int | None = None

    def observe(self, now: float, count: int) -> None:
        """Args:
        now: seconds, never less than before.
        count: prompts so far that could begin, whether they have or not.
        """
        if self._count is None:  # nobody knows how long those have been there
            self._count, self._last = count, now
        for _ in range(count - self._count):
            self._gap.add(now - self._last)
            self._last = now
        self._count = count

    def gap(self, now: float) -> float:
        """Seconds between two, a silence that is longer than the mean included; infinite before any has come."""
        return math.inf if self._gap.value is None else max(self._gap.value, now - self._last)
