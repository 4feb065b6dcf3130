"""Arrival rate of prompts that could start to run."""

import math

from vllm_adapmoe.scheduling.costs import Mean


class Arrivals:
    """Mean time between prompts that could start, over the last ten or so: new prompts, or places becoming free."""

    def __init__(self) -> None:
        self._gap = Mean()
        self._last = 0.0
        self._count: int | None = None

    def observe(self, now: float, count: int) -> None:
        """Updates the mean with the prompts that could start since the last call.

        Args:
            now: time in seconds, never decreasing.
            count: total number of prompts so far that could start, whether they have or not.
        """
        if self._count is None:  # unknown how long the first prompts have waited
            self._count, self._last = count, now
        for _ in range(count - self._count):
            self._gap.add(now - self._last)
            self._last = now
        self._count = count

    def gap(self, now: float) -> float:
        """Returns the mean gap in seconds, or the time since the last prompt if that is longer; infinite before any."""
        return math.inf if self._gap.value is None else max(self._gap.value, now - self._last)
