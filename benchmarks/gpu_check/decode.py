"""Measures decode of a full-size model, ms per token, as parts of the plugin are added, against a lower bound."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from benchmarks.gpu_check.copies import fetch_all, pinned_model, plain_copy
from benchmarks.gpu_check.decoding import InPlace, Inputs, OnDemand
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.report import NOT_RUN, Row, verdict
from benchmarks.gpu_check.routing import curves, draw_tokens
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import cache_shape, open_cache
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.decode_timing import time_decode
from vllm_adapmoe.device.in_place import InPlaceDecode
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController

SECTION = "decode"
FRACTIONS = (0.5, 0.75, 0.25)
"""Residencies to measure, the most interesting first in case time runs out."""
MAX_OF_FLOOR, JUDGED_AT = 1.25, 0.5
"""Maximum time relative to the floor, and the residency at which it is required, with all parts and in place."""
WARM, TOKENS = 3, 20
PLAIN_COPIES = 3


@dataclass(frozen=True)
class Limits:
    """Memory and time that the check may use, and the tokens that it decodes."""

    host_bytes: int
    """Host memory to page-lock."""
    device_bytes: int
    """Device memory for slots."""
    ends: float = float("inf")
    """Time after which no further variant is begun, of `time.monotonic`."""
    warm: int = WARM
    """Decoded tokens that are not timed."""
    tokens: int = TOKENS
    """Decoded tokens that are timed."""


@dataclass(frozen=True)
class Variant:
    """A variant of decoding on demand; each adds a part to the previous one."""

    name: str
    gating: bool = False
    prefetch: bool = False
    allocation: bool = False

    def setup(self, shape: Shape, slots: int) -> CacheSetup:
        """Returns the cache setup as in the paper: LRU, next-layer prefetch, slots of layers by expected loads."""
        ahead = shape.top_k if self.prefetch else 0
        shares = curves(shape, self.gating, ahead) if self.allocation else None
        allocation = "profile" if self.allocation else "pool"
        return CacheSetup([slots], "lru", allocation, shares, lookahead=int(self.prefetch), max_experts=ahead)


BASE = (Variant("on demand, LRU"),)
PUBLISHED = (
    *BASE,
    Variant("+ gating", gating=True),
    Variant("+ prefetch", gating=True, prefetch=True),
    Variant("+ allocation", gating=True, prefetch=True, allocation=True),
)
"""Variants for models with published statistics of gating and prefetch."""


def check_decode(shape: Shape, device: Device, dtype: torch.dtype, seed: int, limits: Limits) -> Iterator[Row]:
    """Measures every variant at 25, 50 and 75 % of the experts resident, as far as time allows.

    The floor is the longer of two times: of the same kernels with every expert resident, in a graph; and of moving the
    variant's bytes, including those read in place, at the bandwidth of a plain copy.
    """
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    nbytes = shape.layout(dtype).nbytes
    warm, tokens = limits.warm, limits.tokens
    whole = shape.layers
    fits = int(limits.device_bytes // nbytes // (max(FRACTIONS) * shape.experts))
    shape = shape.with_layers(min(whole, fits))
    records = min(shape.layers * shape.experts, limits.host_bytes // nbytes)
    if shape.layers < 1 or records < 1:
        raise MemoryError(f"no room for one layer of {shape.name} and one record")
    store = pinned_model(shape, dtype, device, records, seed)
    copy = plain_copy(store, device)
    bandwidth = median([copy() for _ in range(PLAIN_COPIES)])
    del copy  # frees its destination
    every = draw_tokens(shape, warm + tokens, seed)
    inputs = {gated: Inputs(shape, every, gated, dtype, device) for gated in (False, True)}
    cache = open_cache(store, shape, CacheSetup([_slots(shape, max(FRACTIONS))]), device)
    setting = {
        "layers": shape.layers, "layers_of_the_model": whole, "host_records": records, "record_bytes": nbytes,
        "plain_gbps": bandwidth / 1e9, "warm": warm, "tokens": tokens, "seed": seed,
    }  # fmt: skip
    yield Row(
        SECTION, f"{shape.name}: {shape.layers} of {whole} layers, {shape.layers * shape.experts} experts",
        f"of {nbytes / 2**20:.0f} MiB, sharing {records} host records", details=setting,
    )  # fmt: skip
    try:
        fetch_all(cache, shape, shape.top_k)  # so that kernels read weights, not uninitialised memory
        with_gating = (False, True) if shape.single is not None else (False,)
        floors = {}
        for gated in with_gating:
            resident = InPlace(cache, shape, inputs[gated], device)
            resident.step_resident(0)
            floors[gated] = median(_timed(resident.step_resident, device, 0, tokens))
            what = f"{shape.name}: every expert resident{', gated' if gated else ''}"
            yield Row(SECTION, what, f"{floors[gated] * 1e3:.2f} ms", details={"seconds": floors[gated]})
        yield from _by_hit_rate(cache, shape, dtype, device)

        def measure(what: str, variant: Variant, fraction: float, in_place: bool) -> Row:
            name = f"{shape.name}, {fraction:.0%}: {what}"
            if time.monotonic() > limits.ends:
                return Row(SECTION, name, "out of time", "", NOT_RUN)
            setup = variant.setup(shape, _slots(shape, fraction))
            cache.restart(CacheController(cache_shape(shape, nbytes), setup), None)
            way = InPlace if in_place else OnDemand
            step = way(cache, shape, inputs[variant.gating], device).step
            _fill(cache, shape, fraction, seed)
            for number in range(warm):
                step(number)
            before = _stats(cache)
            seconds = _timed(step, device, warm, tokens)
            after = _stats(cache)
            stats = {key: (after[key] - before[key]) / tokens for key in after}
            moved = stats["fetched_bytes"] + stats["in_place"] * nbytes
            floor = max(floors[variant.gating], moved / bandwidth)
            middle = median(seconds)
            judged = fraction == JUDGED_AT and (in_place or variant is PUBLISHED[-1])
            figure = f"{middle * 1e3:.2f} ms, {middle / floor:.2f} of the floor of {floor * 1e3:.2f} ms"
            details = {"seconds": seconds, "floor_seconds": floor, "slots": setup.slots[0], "per_token": stats}
            target = f"<= {MAX_OF_FLOOR} of the floor" if judged else ""
            return Row(
                SECTION, name, figure, target, verdict(middle <= MAX_OF_FLOOR * floor) if judged else "", details
            )

        for fraction in FRACTIONS:
            for variant in PUBLISHED if shape.single is not None else BASE:
                yield measure(variant.name, variant, fraction, in_place=False)
            for gated in with_gating:
                variant = Variant("in place", gating=gated)
                yield measure(f"in place{', gated' if gated else ''}", variant, fraction, in_place=True)
    finally:
        cache.close()


def _by_hit_rate(cache: ExpertCacheManager, shape: Shape, dtype: torch.dtype, device: Device) -> Iterator[Row]:
    """Times one layer and token with fetch and in place, as `decode: auto` does, by hit rate."""
    times = time_decode(cache, InPlaceDecode(cache, shape.top_k, device.torch), shape.top_k, dtype)
    for misses, fetch, read in zip(times.misses, times.fetch, times.in_place, strict=True):
        hits = 1 - misses / shape.top_k
        figure = f"{read * 1e3:.3f} ms in place, {fetch * 1e3:.3f} ms fetched first"
        details = {"fetch_seconds": fetch, "in_place_seconds": read}
        yield Row(SECTION, f"{shape.name}: one layer, hit rate {hits:.0%}", figure, details=details)


def _slots(shape: Shape, fraction: float) -> int:
    return max(shape.top_k + 1, round(fraction * shape.layers * shape.experts))


def _fill(cache: ExpertCacheManager, shape: Shape, fraction: float, seed: int) -> None:
    """Fills the slots with random experts, the same fraction of each layer, so that no variant starts empty."""
    order = np.random.default_rng(seed).random((shape.layers, shape.experts)).argsort(1)
    for layer in range(shape.layers):
        chosen = order[layer, : round(fraction * shape.experts)].tolist()
        for start in range(0, len(chosen), shape.top_k):
            experts = sorted(chosen[start : start + shape.top_k])
            cache.acquire(layer, experts)
            cache.release(layer, experts)


def _timed(step: Callable[[int], object], device: Device, first: int, count: int) -> list[float]:
    """Returns the seconds of each token; the host waits for each token to end, as for sampling."""
    seconds = []
    device.synchronize()
    for number in range(first, first + count):
        start = time.perf_counter()
        step(number)
        device.finish()
        seconds.append(time.perf_counter() - start)
    return seconds


def _stats(cache: ExpertCacheManager) -> dict[str, float]:
    stats = cache.update_stats()
    names = (
        "hits", "misses", "late", "prefetches", "prefetch_hits", "in_place", "caught_up", "fetched_bytes",
        "wasted_bytes", "stall_seconds",
    )  # fmt: skip
    return {name: getattr(stats, name) for name in names}
