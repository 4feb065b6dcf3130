"""StepCounters: what a worker counts in a step, and the metric that each counter becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np


@dataclass(frozen=True)
class Metric:
    """Prometheus metric of one counter."""

    name: str
    """Name after the prefix `vllm:adapmoe_`."""
    help: str
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    """`counter`: steps add up; `gauge`: the last step's value; `histogram`: one observation per step."""
    by_layer: bool = False


@dataclass(frozen=True)
class StepCounters:
    """Increments of one step, and gauges after it; None: not counted. Lists have one entry per MoE layer."""

    hits: float | None = None
    misses: float | None = None
    demand_loads: float | None = None
    prefetches: float | None = None
    prefetch_hits: float | None = None
    late: float | None = None
    prefetches_wasted: float | None = None
    prefetches_cancelled: float | None = None
    fetched_bytes: float | None = None
    host_hits: float | None = None
    host_misses: float | None = None
    wasted_bytes: float | None = None
    fetch_seconds: float | None = None
    stall_seconds: float | None = None
    gated_tokens: float | None = None
    kept_experts: float | None = None
    loss_spent: float | None = None
    held_prefill_steps: float | None = None
    overtakes: float | None = None
    slots: float | None = None
    resident: float | None = None
    link_bandwidth: float | None = None
    layer_hits: Sequence[float] | None = None
    layer_misses: Sequence[float] | None = None
    layer_gated_tokens: Sequence[float] | None = None
    layer_kept_experts: Sequence[float] | None = None
    layer_resident: Sequence[float] | None = None
    layer_experts: Sequence[float] | None = None
    layer_floors: Sequence[float] | None = None

    def counted(self) -> dict[str, Any]:
        """Returns what was counted, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_vector(self) -> np.ndarray:
        """Returns all counted numbers as float64, in the order of the fields, to send them to other ranks."""
        numbers: list[float] = []  # a list: an array for each counter would cost more than the rest of the report
        for value in self.counted().values():
            numbers += value if isinstance(value, Sequence) else (value,)
        return np.array(numbers, np.float64)

    def with_vector(self, vector: np.ndarray) -> Self:
        """Returns counters of the same fields and layers with other numbers, as from `to_vector`."""
        values, start = {}, 0
        for name, value in self.counted().items():
            by_layer = METRICS[name].by_layer
            count = len(value) if by_layer else 1
            numbers = vector[start : start + count].tolist()
            values[name] = numbers if by_layer else numbers[0]
            start += count
        return type(self)(**values)


METRICS = {
    "hits": Metric("expert_hits", "Requested experts that were resident, counted once per layer and step."),
    "misses": Metric("expert_misses", "Requested experts that were not resident, counted once per layer and step."),
    "demand_loads": Metric("demand_loads", "Misses whose fetch began only when the expert was requested."),
    "prefetches": Metric("prefetches", "Fetches started before the expert was requested."),
    "prefetch_hits": Metric("prefetch_hits", "Hits on experts that a prefetch had made resident."),
    "late": Metric("prefetches_late", "Misses on experts whose prefetch was still in flight."),
    "prefetches_wasted": Metric("prefetches_wasted", "Prefetched experts evicted without being requested."),
    "prefetches_cancelled": Metric(
        "prefetches_cancelled", "Prefetches cancelled: the router did not select the expert."
    ),
    "fetched_bytes": Metric("fetched_bytes", "Bytes of experts fetched from the backing store."),
    "host_hits": Metric("host_hits", "Fetches of experts that were in host memory (host_gb)."),
    "host_misses": Metric("host_misses", "Fetches of experts that were read from the packed file (host_gb)."),
    "wasted_bytes": Metric("wasted_bytes", "Bytes fetched by prefetches that were wasted or cancelled."),
    "fetch_seconds": Metric(
        "fetch_seconds",
        "Seconds with fetches in flight; on a GPU, demand loads beside prefetches count twice.",
    ),
    "stall_seconds": Metric("fetch_stall_seconds", "Seconds that one step waited for expert fetches.", "histogram"),
    "gated_tokens": Metric("gated_tokens", "Tokens processed by adaptive gating, counted once per layer."),
    "kept_experts": Metric("kept_experts", "Experts that gated tokens kept, over all layers."),
    "loss_spent": Metric("gating_loss_nats", "Predicted loss caused by gating, in nats summed over all tokens."),
    "held_prefill_steps": Metric(
        "held_prompt_steps", "Steps that deferred waiting prompts so that they share a later step."
    ),
    "overtakes": Metric(
        "overtaking_requests", "Requests started before older ones, to run with requests that use the same experts."
    ),
    "slots": Metric("slots", "Expert slots on the device.", "gauge"),
    "resident": Metric("resident_experts", "Slots that hold an expert.", "gauge"),
    "link_bandwidth": Metric(
        "link_bandwidth_bytes_per_second", "Recent fetch bandwidth, bytes per second of fetch time.", "gauge"
    ),
    "layer_hits": Metric("layer_hits", "Expert hits in one MoE layer.", by_layer=True),
    "layer_misses": Metric("layer_misses", "Expert misses in one MoE layer.", by_layer=True),
    "layer_gated_tokens": Metric(
        "layer_gated_tokens", "Tokens processed by adaptive gating in one MoE layer.", by_layer=True
    ),
    "layer_kept_experts": Metric(
        "layer_kept_experts", "Experts that gated tokens kept in one MoE layer.", by_layer=True
    ),
    "layer_resident": Metric(
        "layer_resident_experts",
        "Resident experts of one MoE layer, without those in staging slots.",
        "gauge",
        by_layer=True,
    ),
    "layer_experts": Metric("layer_experts", "Routed experts of one MoE layer.", "gauge", by_layer=True),
    "layer_floors": Metric(
        "layer_slot_floor",
        "Minimum slots of one MoE layer protected from eviction by other layers.",
        "gauge",
        by_layer=True,
    ),
}
"""Metric of each field of `StepCounters`."""


def over_ranks(ranks: Sequence[StepCounters]) -> StepCounters:
    """Returns the sums over ranks that each hold a shard of every expert; of waiting times the longest."""
    total = ranks[0].with_vector(np.sum([rank.to_vector() for rank in ranks], axis=0)).counted()
    if ranks[0].stall_seconds is not None:
        total["stall_seconds"] = max(rank.stall_seconds or 0.0 for rank in ranks)
    return StepCounters(**total)
