"""Counters of the expert cache on vLLM's `/metrics`, and one log line per interval."""

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
    "hits": ("expert_hits", "Experts that a layer's step asked for and that were resident."),
    "misses": ("expert_misses", "Experts that a layer's step asked for and that were not resident."),
    "demand_loads": ("demand_loads", "Experts that nobody had begun to fetch when they were asked for."),
    "in_place": ("reads_in_place", "Misses that a GPU read in host memory: nobody waited for them."),
    "caught_up": ("reads_caught_up", "Experts fetched after they had been read in place."),
    "prefetches": ("prefetches", "Fetches begun before anyone asked for the expert."),
    "prefetch_hits": ("prefetch_hits", "Hits on experts that a prefetch had brought."),
    "late": ("prefetches_late", "Misses on experts that a prefetch had begun to bring."),
    "prefetches_wasted": ("prefetches_wasted", "Prefetched experts that came, and left without being asked for."),
    "prefetches_cancelled": ("prefetches_cancelled", "Prefetches that the router's word stopped on their way."),
    "fetched_bytes": ("fetched_bytes", "Bytes of experts fetched from the backing store."),
    "wasted_bytes": ("wasted_bytes", "Of those, bytes of prefetches that were of no use."),
    "fetch_seconds": ("fetch_seconds", "Seconds with at least one fetch under way."),
    "gated_tokens": ("gated_tokens", "Tokens, counted once for each layer that gated them."),
    "kept_experts": ("kept_experts", "Experts that gated tokens kept."),
    "held_prefill_steps": ("held_prompt_steps", "Steps that waiting prompts were left out of, to share a later one."),
    "held_tokens": ("held_tokens", "Tokens put off by a step, because others' experts were there."),
    "loss_spent": ("gating_loss_nats", "Loss that gating is predicted to have cost, nats over all tokens."),
}
GAUGES = {
    "slots": ("slots", "Expert slots."),
    "resident": ("resident_experts", "Slots that hold an expert."),
    "link_bandwidth": ("link_bandwidth_bytes_per_second", "Bytes fetched per second of fetching, of late."),
}
LAYER_COUNTERS = {
    "layer_hits": ("layer_hits", "Hits of one MoE layer."),
    "layer_misses": ("layer_misses", "Misses of one MoE layer."),
    "layer_gated_tokens": ("layer_gated_tokens", "Tokens that one MoE layer gated."),
    "layer_kept_experts": ("layer_kept_experts", "Experts that gated tokens kept in one MoE layer."),
}
LAYER_GAUGES = {
    "layer_resident": (
        "layer_resident_experts",
        "Resident experts of one MoE layer, without what waits in staging slots.",
    ),
    "layer_experts": ("layer_experts", "Routed experts of one MoE layer."),
    "layer_floors": ("layer_slot_floor", "Slots that one MoE layer is left with while others have more than theirs."),
}
STALL = ("fetch_stall_seconds", "Seconds that one step waited for experts.")
STALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PREFIX = "vllm:adapmoe_"
LABELS = ["model_name", "engine"]


class ExpertCacheStatLogger(StatLoggerBase):
    """Does nothing for engines without the method."""

    _collectors: dict[str, Any] = {}
    """One set per process: Prometheus takes a name only once, and every engine has labels of its own."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.enabled = adapmoe_settings(vllm_config) is not None
        if not self.enabled:
            return
        self.labels = [str(vllm_config.model_config.served_model_name), str(engine_index)]
        # One of several API servers is told of some of the steps, which adds up on `/metrics` but not in a log.
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
        # Not in __init__: vLLM unregisters every collector named vllm:* between the two.
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


# An engine without the method makes one too: what a later vLLM asks of its loggers must not keep that from starting.
ExpertCacheStatLogger.__abstractmethods__ = frozenset()


def _metric_classes() -> tuple[Any, Any, Any]:
    """Prometheus' own, or Ray's in a process of Ray, where nobody reads Prometheus' registry."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return Counter, Gauge, Histogram
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

    return RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper
