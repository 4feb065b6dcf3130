"""Exports the expert cache's counters on vLLM's `/metrics`, and logs one line per interval."""

import sys
import time
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_adapmoe.integration.compat import is_switched_on
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.scheduling.counters import METRICS

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

STALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PREFIX = "vllm:adapmoe_"
STALL = "stall_seconds"
LABELS = ["model_name", "engine"]


class ExpertCacheStatLogger(StatLoggerBase):
    """Exports the expert cache's counters and logs a summary; does nothing for engines without the method."""

    _collectors: dict[str, Any] = {}
    """Collectors shared by all engines of a process, told apart by labels: Prometheus registers a name only once."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.enabled = is_switched_on(vllm_config)
        if not self.enabled:
            return
        self.labels = [str(vllm_config.model_config.served_model_name), str(engine_index)]
        # Each of several API servers gets the statistics of some steps only: `/metrics` adds up, a log line would not.
        self.logs = vllm_config.parallel_config._api_process_count == 1
        self.counted: dict[str, float] = {
            key: 0.0 for key, metric in METRICS.items() if metric.kind != "gauge" and not metric.by_layer
        }
        self.logged = dict(self.counted)
        self.logged_at = time.monotonic()
        self.gauges: dict[str, float] = {}
        self.num_layers = 0
        gating = EngineSettings.of(vllm_config).gating
        self.loss_scale = 1.0 if gating is None else gating.loss_scale
        self._series: dict[str, Any] = {}
        self._layer_series: dict[str, list[Any]] = {}

    def log_engine_initialized(self) -> None:
        # Not in __init__: vLLM unregisters every collector named vllm:* between these two calls.
        if not self.enabled:
            return
        counter, gauge, histogram = _metric_classes()
        unregistered = PREFIX + METRICS[STALL].name not in REGISTRY._names_to_collectors
        if not self._collectors or (counter is Counter and unregistered):
            self._register(counter, gauge, histogram)
        self._series = {
            key: self._collectors[key].labels(*self.labels) for key, metric in METRICS.items() if not metric.by_layer
        }

    def _register(self, counter: Any, gauge: Any, histogram: Any) -> None:
        for key, metric in METRICS.items():
            name, labels = PREFIX + metric.name, [*LABELS, "layer"] if metric.by_layer else LABELS
            if metric.kind == "counter":
                self._collectors[key] = counter(name, metric.help, labels)
            elif metric.kind == "gauge":
                self._collectors[key] = gauge(name, metric.help, labels, multiprocess_mode="mostrecent")
            else:
                self._collectors[key] = histogram(name, metric.help, labels, buckets=STALL_BUCKETS)

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        stats = getattr(scheduler_stats, "worker_stats", None)
        if not self.enabled or not stats:
            return
        for key, value in stats.items():
            metric = METRICS[key]
            if metric.by_layer:
                self._record_layers(key, value)
            elif metric.kind == "histogram":
                for seconds in value:
                    self._series[key].observe(seconds)
                self.counted[key] += sum(value)
            elif metric.kind == "gauge":
                self._series[key].set(value)
                self.gauges[key] = value
            else:
                if key == "loss_spent":
                    value *= self.loss_scale
                if value:
                    self._series[key].inc(value)
                    self.counted[key] += value

    def _record_layers(self, key: str, values: list[float]) -> None:
        self.num_layers = len(values)
        series = self._layer_series.get(key)
        if series is None:
            series = [self._collectors[key].labels(*self.labels, str(layer)) for layer in range(len(values))]
            self._layer_series[key] = series
        for of_layer, value in zip(series, values, strict=True):
            if METRICS[key].kind == "gauge":
                of_layer.set(value)
            elif value:
                of_layer.inc(value)

    def log(self) -> None:
        if not self.enabled or not self.logs:
            return
        now = time.monotonic()
        change = {key: value - self.logged[key] for key, value in self.counted.items()}
        parts = self._describe(change, now - self.logged_at)
        if parts:
            logger.info("Expert cache: %s", ", ".join(parts))
        self.logged, self.logged_at = dict(self.counted), now

    def _describe(self, change: dict[str, float], seconds: float) -> list[str]:
        requested, tokens = change["hits"] + change["misses"], change["gated_tokens"]
        parts = []
        if requested:
            parts += [
                f"hit rate: {change['hits'] / requested:.1%}",
                f"fetched: {change['fetched_bytes'] / seconds / 2**20:.1f} MiB/s",
                f"at {change['fetched_bytes'] / max(change['fetch_seconds'], 1e-9) / 1e9:.2f} GB/s while fetching",
                f"waiting for experts: {change[STALL] / seconds:.1%} of the time",
                f"resident: {self.gauges['resident']:.0f} of {self.gauges['slots']:.0f} slots",
            ]
        if change["prefetches"]:
            used = change["prefetch_hits"] + change["late"]
            parts.append(f"prefetches used: {used:.0f} of {change['prefetches']:.0f}")
        if tokens:
            parts.append(f"experts per token: {change['kept_experts'] / tokens:.2f}")
        if change["loss_spent"] and self.num_layers:
            parts.append(f"gating loss: {change['loss_spent'] / tokens * self.num_layers:.4f} nats/token")
        return parts


# vLLM also instantiates this logger for engines without the method, and an abstract method that a later vLLM adds must
# not keep those from starting.
ExpertCacheStatLogger.__abstractmethods__ = frozenset()


def _metric_classes() -> tuple[Any, Any, Any]:
    """Returns Prometheus' metric classes, or Ray's wrappers in a Ray process, which does not export the registry."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return Counter, Gauge, Histogram
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

    return RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper
