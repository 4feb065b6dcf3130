"""Collects the worker's counters until they are sent to an API server."""

import time
from collections.abc import Callable
from typing import Any

from vllm_adapmoe.scheduling.counters import METRICS, StepCounters

Stats = dict[str, float | list[float]]

LAYER_SECONDS = 1.0
"""Minimum seconds between two reports of per-layer statistics, which are long."""
BANDWIDTH_SECONDS = 1.0
"""Seconds of fetch time that the bandwidth is averaged over."""


class StatsOutbox:
    """Adds up the steps' counters until they are sent. Each API server gets a part, and together they get everything.

    Args:
        clock: returns seconds; replaceable for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._layers_sent = -LAYER_SECONDS
        self._recent_bytes = self._recent_seconds = 0.0

    def add(self, counters: StepCounters, tokens: int) -> None:
        """Adds the counters of one step of `tokens` tokens; with 0, the step computes nothing."""
        for name, value in counters.counted().items():
            metric = METRICS[name]
            waiting = self._layers if metric.by_layer else self._waiting
            if metric.kind == "histogram":
                if value or tokens:
                    waiting.setdefault(name, []).append(value)
            elif metric.kind == "gauge" or name not in waiting:
                waiting[name] = value
            elif metric.by_layer:
                waiting[name] = [before + now for before, now in zip(waiting[name], value, strict=True)]
            else:
                waiting[name] += value
        if counters.fetched_bytes is not None and counters.fetch_seconds is not None:
            self._measure(counters.fetched_bytes, counters.fetch_seconds)

    def _measure(self, nbytes: float, seconds: float) -> None:
        weight = max(0.0, 1.0 - seconds / BANDWIDTH_SECONDS)
        self._recent_bytes = weight * self._recent_bytes + nbytes
        self._recent_seconds = weight * self._recent_seconds + seconds
        if self._recent_seconds > 0:
            self._waiting["link_bandwidth"] = self._recent_bytes / self._recent_seconds

    def take(self, idle: bool) -> Stats | None:
        """Returns and clears the statistics to be sent; None if there are none.

        Counters are increments since the last call, gauges current values, `stall_seconds` has one entry per step.
        Per-layer statistics are sent once per `LAYER_SECONDS`, or when the engine becomes `idle`.
        """
        sent, self._waiting = self._waiting, {}
        now = self._clock()
        if self._layers and (idle or now - self._layers_sent >= LAYER_SECONDS):
            sent |= self._layers
            self._layers, self._layers_sent = {}, now
        return sent or None
