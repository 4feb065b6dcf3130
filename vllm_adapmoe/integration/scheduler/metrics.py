"""Exports the expert cache's counters on vLLM's `/metrics`, and logs one line per interval."""

import sys
import time
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_adapmoe.integration.entry.compat import adapmoe_settings, gating_settings

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

COUNTERS = {
    "hits": ("expert_hits", "Requested experts that were resident, counted once per layer and step."),
    "misses": ("expert_misses", "Requested experts that were not resident, counted once per layer and step."),
    "demand_loads": ("demand_loads", "Misses whose fetch began only when the expert was requested."),
    "in_place": ("reads_in_place", "Misses that the GPU read from host memory without waiting for a fetch."),
    "caught_up": ("reads_caught_up", "Misses read in place whose expert was fetched into a slot afterwards."),
    "prefetches": ("prefetches", "Fetches started before the expert was requested."),
    "prefetch_hits": ("prefetch_hits", "Hits on experts that a prefetch had made resident."),
    "late": ("prefetches_late", "Misses on experts whose prefetch was still in flight."),
    "prefetches_wasted": ("prefetches_wasted", "Prefetched experts evicted without being requested."),
    "prefetches_cancelled": ("prefetches_cancelled", "Prefetches cancelled: the router did not select the expert."),
    "fetched_bytes": ("fetched_bytes", "Bytes of experts fetched from the backing store."),
    "wasted_bytes": ("wasted_bytes", "Bytes fetched by prefetches that were wasted or cancelled."),
    "fetch_seconds": ("fetch_seconds", "Seconds with at least one fetch in flight."),
    "gated_tokens": ("gated_tokens", "Tokens processed by adaptive gating, counted once per layer."),
    "kept_experts": ("kept_experts", "Experts that gated tokens kept, over all layers."),
    "held_prefill_steps": ("held_prompt_steps", "Steps that deferred waiting prompts so that they share a later step."),
    "held_tokens": ("held_tokens", "Decode tokens deferred while the resident experts serve other requests."),
    "loss_spent": ("gating_loss_nats", "Predicted loss caused by gating, in nats summed over all tokens."),
}
GAUGES = {
    "slots": ("slots", "Expert slots on the device."),
    "resident": ("resident_experts", "Slots that hold an expert."),
    "link_bandwidth": ("link_bandwidth_bytes_per_second", "Recent fetch bandwidth, bytes per second of fetch time."),
}
LAYER_COUNTERS = {
    "layer_hits": ("layer_hits", "Expert hits in one MoE layer."),
    "layer_misses": ("layer_misses", "Expert misses in one MoE layer."),
    "layer_gated_tokens": ("layer_gated_tokens", "Tokens processed by adaptive gating in one MoE layer."),
    "layer_kept_experts": ("layer_kept_experts", "Experts that gated tokens kept in one MoE layer."),
}
LAYER_GAUGES = {
    "layer_resident": (
        "layer_resident_experts",
        "Resident experts of one MoE layer, without those in staging slots.",
    ),
    "layer_experts": ("layer_experts", "Routed experts of one MoE layer."),
    "layer_floors": ("layer_slot_floor", "Minimum slots of one MoE layer protected from eviction by other layers."),
}
STALL = ("fetch_stall_seconds", "Seconds that one step waited for expert fetches.")
STALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PREFIX = "vllm:adapmoe_"
LABELS = ["model_name", "engine"]


class ExpertCacheStatLogger(StatLoggerBase):
    """Exports the expert cache's counters and logs a summary; does nothing for engines without the method."""

    _collectors: dict[str, Any] = {}
    """Collectors shared by all engines of a process, told apart by labels: Prometheus registers a name only once."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.enabled = adapmoe_settings(vllm_config) is not None
        if not self.enabled:
            return
        self.labels = [str(vllm_config.model_config.served_model_name), str(engine_index)]
        # Each of several API servers gets the statistics of some steps only: `/metrics` adds up, a log line would not.
        self.logs = vllm_config.parallel_config._api_process_count == 1
        self.counted: dict[str, float] = dict.fromkeys((*COUNTERS, "stall_seconds"), 0.0)
        self.logged = dict(self.counted)
        self.logged_at = time.monotonic()
        self.gauges: dict[str, float] = {}
        self.num_layers = 0
        self.loss_scale = (gating_settings(vllm_config) or {}).get("loss_scale", 1.0)
        self._series: dict[str, Any] = {}
        self._layer_series: dict[str, list[Any]] = {}

    def log_engine_initialized(self) -> None:
        # Not in __init__: vLLM unregisters every collector named vllm:* between these two calls.
        if not self.enabled:
            return
        counter, gauge, histogram = _metric_classes()
        if not self._collectors or (counter is Counter and PREFIX + STALL[0] not in REGISTRY._names_to_collectors):
            self._register(counter, gauge, histogram)
        self._series = {
            key: self._collectors[key].labels(*self.labels) for key in (*COUNTERS, *GAUGES, "stall_seconds")
        }

    def _register(self, counter: Any, gauge: Any, histogram: Any) -> None:
        collectors, by_layer = self._collectors, [*LABELS, "layer"]
        for keys, labels in ((COUNTERS, LABELS), (LAYER_COUNTERS, by_layer)):
            for key, (name, text) in keys.items():
                collectors[key] = counter(PREFIX + name, text, labels)
        for keys, labels in ((GAUGES, LABELS), (LAYER_GAUGES, by_layer)):
            for key, (name, text) in keys.items():
                collectors[key] = gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent")
        collectors["stall_seconds"] = histogram(PREFIX + STALL[0], STALL[1], LABELS, buckets=STALL_BUCKETS)

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        stats = getattr(scheduler_stats, "worker_stats", None)
        if not self.enabled or not stats:
            return
        for key, value in stats.items():
            if key == "stall_seconds":
                for seconds in value:
                    self._series[key].observe(seconds)
                self.counted[key] += sum(value)
            elif key in GAUGES:
                self._series[key].set(value)
                self.gauges[key] = value
            elif key in COUNTERS:
                if key == "loss_spent":
                    value *= self.loss_scale
                if value:
                    self._series[key].inc(value)
                    self.counted[key] += value
            else:
                self._record_layers(key, value)

    def _record_layers(self, key: str, values: list[float]) -> None:
        self.num_layers = len(values)
        series = self._layer_series.get(key)
        if series is None:
            series = [self._collectors[key].labels(*self.labels, str(layer)) for layer in range(len(values))]
            self._layer_series[key] = series
        for one, value in zip(series, values, strict=True):
            if key in LAYER_GAUGES:
                one.set(value)
            elif value:
                one.inc(value)

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
                f"waiting for experts: {change['stall_seconds'] / seconds:.1%} of the time",
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
