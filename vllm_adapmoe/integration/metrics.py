"""Counters of the expert cache on vLLM's `/metrics`, and one log line per interval."""

import sys
import time
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_adapmoe.integration.compat import adapmoe_settings

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

COUNTERS = {
    "hits": ("vllm:adapmoe_expert_hits", "Experts that a layer's step asked for and that were resident."),
    "misses": ("vllm:adapmoe_expert_misses", "Experts that a layer's step asked for and had to wait for."),
    "demand_loads": ("vllm:adapmoe_demand_loads", "Experts that nobody had begun to fetch when they were asked for."),
    "prefetches": ("vllm:adapmoe_prefetches", "Fetches begun before anyone asked for the expert."),
    "prefetch_hits": ("vllm:adapmoe_prefetch_hits", "Hits on experts that a prefetch had brought."),
    "late": ("vllm:adapmoe_prefetches_late", "Misses on experts that a prefetch had begun to bring."),
    "fetched_bytes": ("vllm:adapmoe_fetched_bytes", "Bytes of experts fetched from the backing store."),
    "wasted_bytes": ("vllm:adapmoe_wasted_bytes", "Of those, bytes of prefetches that were of no use."),
    "stall_seconds": ("vllm:adapmoe_fetch_stall_seconds", "Seconds that layers waited for experts."),
    "fetch_seconds": ("vllm:adapmoe_fetch_seconds", "Seconds with at least one fetch under way."),
    "gated_tokens": ("vllm:adapmoe_gated_tokens", "Tokens, counted once for each layer that gated them."),
    "kept_experts": ("vllm:adapmoe_kept_experts", "Experts that gated tokens kept."),
    "loss_spent": ("vllm:adapmoe_gating_loss_nats", "Loss that gating is foretold to have cost, nats over all tokens."),
}
GAUGES = {
    "slots": ("vllm:adapmoe_slots", "Expert slots of a worker."),
    "resident": ("vllm:adapmoe_resident_experts", "Slots that hold an expert."),
}
LABELS = ["model_name", "engine"]


class ExpertCacheStatLogger(StatLoggerBase):
    """Does nothing for engines without the method."""

    _collectors: dict[str, Any] = {}
    """One set per process: Prometheus takes a name only once, and every engine has labels of its own."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.enabled = adapmoe_settings(vllm_config) is not None
        self.labels = [str(vllm_config.model_config.served_model_name), str(engine_index)]
        self.exported: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.latest: dict[str, float] = {}
        self.logged: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.logged_at = time.monotonic()

    def log_engine_initialized(self) -> None:
        # Not in __init__: vLLM unregisters every collector named vllm:* between the two.
        if not self.enabled:
            return
        counter, gauge = _metric_classes()
        if not self._collectors or (counter is Counter and not _registered(next(iter(COUNTERS.values()))[0])):
            for key, (name, text) in COUNTERS.items():
                self._collectors[key] = counter(name, text, LABELS)
            for key, (name, text) in GAUGES.items():
                self._collectors[key] = gauge(name, text, LABELS, multiprocess_mode="mostrecent")
        for collector in self._collectors.values():
            collector.labels(*self.labels)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        stats = getattr(scheduler_stats, "worker_stats", None)
        if not self.enabled or not stats:
            return
        self.latest = stats
        for key in COUNTERS:
            self._collectors[key].labels(*self.labels).inc(stats[key] - self.exported[key])
            self.exported[key] = stats[key]
        for key in GAUGES:
            self._collectors[key].labels(*self.labels).set(stats[key])

    def log(self) -> None:
        now = time.monotonic()
        change = {key: self.exported[key] - self.logged[key] for key in COUNTERS}
        requested = change["hits"] + change["misses"]
        parts = []
        if requested:
            seconds = now - self.logged_at
            parts += [
                f"hit rate: {change['hits'] / requested:.1%}",
                f"fetched: {change['fetched_bytes'] / seconds / 2**20:.1f} MiB/s",
                f"at {change['fetched_bytes'] / max(change['fetch_seconds'], 1e-9) / 1e9:.2f} GB/s while fetching",
                f"waiting for experts: {change['stall_seconds'] / seconds:.1%} of the time",
                f"resident: {self.latest['resident']} of {self.latest['slots']} slots",
            ]
        if change["gated_tokens"]:
            parts.append(f"experts per token: {change['kept_experts'] / change['gated_tokens']:.2f}")
        if parts:
            logger.info("Expert cache: %s", ", ".join(parts))
        self.logged, self.logged_at = dict(self.exported), now


def _metric_classes() -> tuple[Any, Any]:
    """Counter and gauge: Prometheus' own, or Ray's in a process of Ray, where nobody reads Prometheus' registry."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return Counter, Gauge
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper

    return RayCounterWrapper, RayGaugeWrapper


def _registered(name: str) -> bool:
    from prometheus_client import REGISTRY

    return name in REGISTRY._names_to_collectors
