"""The worker's counters between a step and the API server that is told of them."""

import time
from collections.abc import Callable

Stats = dict[str, float | list[float]]

GAUGES = {"slots", "resident", "layer_resident", "layer_experts", "layer_floors"}
LAYER_SECONDS = 1.0
"""Between two reports of single layers: there are many, and nobody looks at them more often."""
BANDWIDTH_SECONDS = 1.0
"""Of fetching, that the bandwidth is averaged over."""


class StatsOutbox:
    """Adds up what the steps counted until it is sent. Every API server is sent some of it, and together they get all.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: Stats = {}
        self._layers: Stats = {}
        self._layers_sent = -LAYER_SECONDS
        self._recent_bytes = self._recent_seconds = 0.0

    def add(self, stats: Stats | None, tokens: int) -> None:
        """What one step of so many tokens counted (`StepStats.step`). A step without any computes nothing."""
        for name, value in (stats or {}).items():
            held = self._layers if name.startswith("layer_") else self._waiting
            if name == "stall_seconds":
                if value or tokens:
                    held.setdefault(name, []).append(value)  # type: ignore[union-attr, arg-type]
            elif name in GAUGES or name not in held:
                held[name] = value
            elif isinstance(value, list):
                held[name] = [one + other for one, other in zip(held[name], value, strict=True)]  # type: ignore[arg-type]
            else:
                held[name] += value  # type: ignore[operator]
        if stats and "fetched_bytes" in stats:
            self._measure(stats["fetched_bytes"], stats["fetch_seconds"])  # type: ignore[arg-type]

    def _measure(self, nbytes: float, seconds: float) -> None:
        keep = max(0.0, 1.0 - seconds / BANDWIDTH_SECONDS)
        self._recent_bytes = keep * self._recent_bytes + nbytes
        self._recent_seconds = keep * self._recent_seconds + seconds
        if self._recent_seconds > 0:
            self._waiting["link_bandwidth"] = self._recent_bytes / self._recent_seconds

    def take(self, idle: bool) -> Stats | None:
        """Everything since the last time, to be sent; None if there is nothing.

        Counters have grown by that much, gauges are what they are, `stall_seconds` has one entry for each step.
        What is said of layers waits for its time, unless the engine falls `idle`.
        """
        sent, self._waiting = self._waiting, {}
        now = self._clock()
        if self._layers and (idle or now - self._layers_sent >= LAYER_SECONDS):
            sent |= self._layers
            self._layers, self._layers_sent = {}, now
        return sent or None
