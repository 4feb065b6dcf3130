"""Collects the worker's counters until they are sent to an API server."""

import time
from collections.abc import Callable

Stats = dict[str, float | list[float]]

GAUGES = {"slots", "resident", "layer_resident", "layer_experts", "layer_floors"}
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
        self._waiting: Stats = {}
        self._layers: Stats = {}
        self._layers_sent = -LAYER_SECONDS
        self._recent_bytes = self._recent_seconds = 0.0

    def add(self, stats: Stats | None, tokens: int) -> None:
        """Adds the counters of one step (`StepStats.step`) of `tokens` tokens; with 0, the step computes nothing."""
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
