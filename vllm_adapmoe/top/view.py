"""Computes the view from two readings: rates between them, and totals since the server's start. Pure."""

from dataclasses import dataclass

from vllm_adapmoe.top.sample import CACHE, Sample


@dataclass(frozen=True)
class Span:
    """Activity during a span of time; None where nothing was measured."""

    seconds: float | None
    """Length of the span; None: since the server's start."""
    output_tokens: float
    first_token_seconds: float | None
    """Mean time to the first token."""
    token_seconds: float | None
    """Mean time between tokens of a request."""
    hit_rate: float | None
    fetched_bytes: float
    in_host_memory: float | None
    """Share of fetches whose expert was in host memory, with `host_gb`."""
    bytes_per_second: float | None
    """Mean bandwidth while fetching."""
    stall_seconds: float
    """Time that steps waited for experts."""
    prefetches: float
    prefetches_used: float
    prefetches_wasted: float
    prefetches_cancelled: float
    experts_per_token: float | None
    """Mean experts per token and layer kept by gating."""
    loss_per_token: float | None
    """Predicted loss of gating per token, all layers together, nats."""


@dataclass(frozen=True)
class LayerView:
    """One MoE layer."""

    layer: int
    resident: float
    experts: float
    floor: float | None
    """Minimum slots of the layer protected from eviction."""
    hit_rate: float | None
    """Hit rate between the readings; since the start if no request ran in between."""
    experts_per_token: float | None


@dataclass(frozen=True)
class View:
    """Everything that `adapmoe top` shows."""

    model: str
    running: float
    waiting: float
    slots: float
    resident: float
    interval: Span
    start: Span
    layers: list[LayerView]


def make_view(before: Sample, now: Sample) -> View:
    """Makes the view from two readings of one server. Counters that fell mean that the server was restarted."""
    values = now.values
    layers = sorted({layer for by_layer in now.layers.values() for layer in by_layer})
    return View(
        now.model,
        values.get("vllm:num_requests_running", 0.0),
        values.get("vllm:num_requests_waiting", 0.0),
        values[CACHE + "slots"],
        values[CACHE + "resident_experts"],
        _span(before, now, now.at - before.at, len(layers)),
        _span(Sample(0.0), now, None, len(layers)),
        [_layer(layer, before, now) for layer in layers],
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _growth(before: float, now: float) -> float:
    return now - before if now >= before else now


def _span(before: Sample, now: Sample, seconds: float | None, layers: int) -> Span:
    def grown(name: str) -> float:
        return _growth(before.values.get(name, 0.0), now.values.get(name, 0.0))

    def mean(name: str) -> float | None:
        return _ratio(grown(f"vllm:{name}_sum"), grown(f"vllm:{name}_count"))

    hits, misses = grown(CACHE + "expert_hits_total"), grown(CACHE + "expert_misses_total")
    fetched, gated = grown(CACHE + "fetched_bytes_total"), grown(CACHE + "gated_tokens_total")
    in_host, on_disk = grown(CACHE + "host_hits_total"), grown(CACHE + "host_misses_total")
    loss = _ratio(grown(CACHE + "gating_loss_nats_total"), gated)
    return Span(
        seconds=seconds,
        output_tokens=grown("vllm:generation_tokens_total"),
        first_token_seconds=mean("time_to_first_token_seconds"),
        token_seconds=mean("inter_token_latency_seconds"),
        hit_rate=_ratio(hits, hits + misses),
        fetched_bytes=fetched,
        in_host_memory=_ratio(in_host, in_host + on_disk),
        bytes_per_second=_ratio(fetched, grown(CACHE + "fetch_seconds_total")),
        stall_seconds=grown(CACHE + "fetch_stall_seconds_sum"),
        prefetches=grown(CACHE + "prefetches_total"),
        prefetches_used=grown(CACHE + "prefetch_hits_total") + grown(CACHE + "prefetches_late_total"),
        prefetches_wasted=grown(CACHE + "prefetches_wasted_total"),
        prefetches_cancelled=grown(CACHE + "prefetches_cancelled_total"),
        experts_per_token=_ratio(grown(CACHE + "kept_experts_total"), gated),
        loss_per_token=None if loss is None or not layers else loss * layers,
    )


def _layer(layer: int, before: Sample, now: Sample) -> LayerView:
    def value(name: str) -> float | None:
        return now.layers.get(name, {}).get(layer)

    def share(part: str, *whole: str) -> float | None:
        """Returns a ratio of counters between the readings, or since the start if they did not change."""
        for start in (before, Sample(0.0)):
            grown = {
                name: _growth(start.layers.get(name, {}).get(layer, 0.0), value(name) or 0.0) for name in (part, *whole)
            }
            if (ratio := _ratio(grown[part], sum(grown[name] for name in whole))) is not None:
                return ratio
        return None

    return LayerView(
        layer,
        value("resident_experts") or 0.0,
        value("experts") or 0.0,
        value("slot_floor"),
        share("hits_total", "hits_total", "misses_total"),
        share("kept_experts_total", "gated_tokens_total"),
    )
