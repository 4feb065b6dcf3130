"""Measures decode of a full-size model, ms per token, as parts of the plugin are added, against a lower bound."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from benchmarks.gpu_check.copies import fetch_all, pinned_model, plain_copy
from benchmarks.gpu_check.decoding import Inputs, OnDemand, OnDevice, Resident
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.report import NOT_RUN, Row, verdict
from benchmarks.gpu_check.routing import curves, draw_tokens
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import cache_shape, open_cache
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.results import rotated, spread

SECTION = "decode"
FRACTIONS = (0.5, 0.75, 0.25)
"""Residencies to measure, the most interesting first in case time runs out."""
MAX_OF_FLOOR, MAX_OF_FLOOR_ON_DEVICE, JUDGED_AT = 1.25, 1.15, 0.5
"""Maximum time relative to the floor, decided by the host with all parts and on the device, and the residency at which
it is required."""
MIN_OF_RESIDENT = 0.97
"""Required speed with every expert resident and the GPU asking which are, of the same kernels that do not ask."""
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
    """A variant of decoding; on demand, each adds a part to the previous one."""

    name: str
    gating: bool = False
    prefetch: bool = False
    allocation: bool = False
    on_device: bool = False
    """Whether the GPU decides, not the host."""

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
    variant's bytes at the bandwidth of a plain copy.
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
            resident = Resident(cache, shape, inputs[gated], device)
            resident.replay_token(0)
            floors[gated] = median(_timed(resident.replay_token, device, 0, tokens))
            what = f"{shape.name}: every expert resident{', gated' if gated else ''}"
            yield Row(SECTION, what, f"{floors[gated] * 1e3:.2f} ms", details={"seconds": floors[gated]})
        yield _asking(cache, shape, inputs[False], device, tokens)

        def measure(variant: Variant, fraction: float) -> Row:
            name = f"{shape.name}, {fraction:.0%}: {variant.name}"
            if time.monotonic() > limits.ends:
                return Row(SECTION, name, "out of time", "", NOT_RUN)
            setup = variant.setup(shape, _slots(shape, fraction))
            cache.restart(CacheController(cache_shape(shape, nbytes), setup), None)
            _fill(cache, shape, fraction, seed)
            way: OnDemand | OnDevice
            if variant.on_device:
                way = OnDevice(cache, shape, inputs[variant.gating], device, variant.prefetch)
            else:
                way = OnDemand(cache, shape, inputs[variant.gating], device)
            for number in range(warm):
                way.step(number)
            before = _stats(way)
            seconds = _timed(way.step, device, warm, tokens)
            after = _stats(way)
            way.give_back()
            stats = {key: (after[key] - before[key]) / tokens for key in after}
            floor = max(floors[variant.gating], stats["fetched_bytes"] / bandwidth)
            middle = median(seconds)
            limit = MAX_OF_FLOOR_ON_DEVICE if variant.on_device else MAX_OF_FLOOR
            judged = fraction == JUDGED_AT and (variant.on_device or variant is PUBLISHED[-1])
            figure = f"{middle * 1e3:.2f} ms, {middle / floor:.2f} of the floor of {floor * 1e3:.2f} ms"
            details = {"seconds": seconds, "floor_seconds": floor, "slots": setup.slots[0], "per_token": stats}
            target = f"<= {limit} of the floor" if judged else ""
            return Row(SECTION, name, figure, target, verdict(middle <= limit * floor) if judged else "", details)

        for fraction in FRACTIONS:
            for variant in PUBLISHED if shape.single is not None else BASE:
                yield measure(variant, fraction)
            for variant in _on_device(shape, with_gating):
                yield measure(variant, fraction)
    finally:
        cache.close()


def _on_device(shape: Shape, with_gating: tuple[bool, ...]) -> Iterator[Variant]:
    """Yields the variants that the GPU decides: with prefetch only for models with published predictions."""
    for gated in with_gating:
        with_gate = ", gated" if gated else ""
        yield Variant(f"on the device{with_gate}", gating=gated, on_device=True)
        if shape.recall is not None:
            yield Variant(f"on the device + prefetch{with_gate}", gating=gated, prefetch=True, on_device=True)


def _asking(cache: ExpertCacheManager, shape: Shape, inputs: Inputs, device: Device, tokens: int) -> Row:
    """Times decode with every expert resident through `claim` and `fetch`, against the same kernels without them.

    In as many of the first layers as there are slots for. `claim` and `fetch` find nothing to load.
    """
    layers = min(shape.layers, cache.num_slots // shape.experts)
    what = f"{shape.name}: {layers} layers with every expert resident, speed with the GPU asking which are"
    if not layers:
        return Row(SECTION, what, "no slots for the experts of one layer", "", NOT_RUN)
    part = replace(shape, layers=layers)
    cache.restart(cache.controller.empty_copy(), None)
    fetch_all(cache, part, shape.top_k)
    misses = cache.update_stats().misses
    on_device, resident = OnDevice(cache, part, inputs, device), Resident(cache, part, inputs, device)
    ways = {"asking": on_device.replay_token, "resident": resident.replay_token}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(tokens + 1):
        for name in rotated(list(ways), number):
            timed = _timed(ways[name], device, number % len(inputs.tokens), 1)
            seconds[name] += timed if number else []  # the first loads the kernels
    on_device.give_back()
    misses = cache.update_stats().misses - misses
    ratio = spread([resident / asking for resident, asking in zip(seconds["resident"], seconds["asking"], strict=True)])
    return Row(
        SECTION, what, f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})", f">= {MIN_OF_RESIDENT}",
        verdict(ratio["median"] >= MIN_OF_RESIDENT and misses == 0),
        {"ratio": ratio, "seconds": seconds, "misses": misses},
    )  # fmt: skip


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


def _stats(way: OnDemand | OnDevice) -> dict[str, float]:
    stats = way.stats()
    names = (
        "hits", "misses", "late", "prefetches", "prefetch_hits", "fetched_bytes", "wasted_bytes", "stall_seconds",
    )  # fmt: skip
    return {name: getattr(stats, name) for name in names}
