"""Decode of a full-size model, in milliseconds per token: what each part of the plugin brings, against the floor."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from vllm_adapmoe.bench.gpu_check.copies import fetch_all, pinned_model, plain_copy
from vllm_adapmoe.bench.gpu_check.decoding import InPlace, Inputs, OnDemand, record_addresses
from vllm_adapmoe.bench.gpu_check.device import Device
from vllm_adapmoe.bench.gpu_check.records import PinnedRecords
from vllm_adapmoe.bench.gpu_check.report import NOT_RUN, Row
from vllm_adapmoe.bench.gpu_check.routing import curves, draw_tokens
from vllm_adapmoe.bench.gpu_check.shapes import Shape
from vllm_adapmoe.bench.gpu_check.slot_rows import cache_shape, open_cache
from vllm_adapmoe.cache.controller import CacheController, CacheSetup
from vllm_adapmoe.cache.manager import ExpertCacheManager

SECTION = "decode"
FRACTIONS = (0.75, 0.5, 0.25)
WARM, TOKENS = 8, 20
PLAIN_COPIES = 3


@dataclass(frozen=True)
class Limits:
    """What a machine lends to the check."""

    host_bytes: int
    """To page-lock."""
    device_bytes: int
    """For slots."""
    ends: float = float("inf")
    """When no further variant is begun, of `time.monotonic`."""


@dataclass(frozen=True)
class Variant:
    """Of decoding on demand; each adds a part to the one before."""

    name: str
    gating: bool = False
    prefetch: bool = False
    allocation: bool = False

    def setup(self, shape: Shape, slots: int) -> CacheSetup:
        """As the paper has it: LRU, the next layer's foretold experts, shares of layers by expected loads."""
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
"""Where statistics of gating and prefetch are published."""


def check_decode(
    shape: Shape, device: Device, dtype: torch.dtype, seed: int, limits: Limits, warm: int = WARM, tokens: int = TOKENS
) -> Iterator[Row]:
    """Every variant at 25, 50 and 75 % of the experts resident, as far as time goes.

    The floor is the greater of two times: of the same kernels with every expert resident, in a graph, and of the
    variant's bytes at the bandwidth of a plain copy.
    """
    nbytes = shape.layout(dtype).nbytes
    whole = shape.layers
    fits = int(limits.device_bytes // nbytes // (max(FRACTIONS) * shape.experts))
    shape = shape.with_layers(min(whole, fits))
    records = min(shape.layers * shape.experts, limits.host_bytes // nbytes)
    if shape.layers < 1 or records < 1:
        raise MemoryError(f"no room for one layer of {shape.name} and one record")
    store = pinned_model(shape, dtype, device, records, seed)
    copy = plain_copy(store, device)
    bandwidth = median([copy() for _ in range(PLAIN_COPIES)])
    del copy  # and its destination
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
        fetch_all(cache, shape, shape.top_k)  # kernels read weights, not what was in the memory before
        gated = (False, True) if shape.single is not None else (False,)
        floors = {}
        for one in gated:
            everywhere = InPlace(_addresses(cache, store, shape, 1.0, seed), shape, inputs[one], device)
            floors[one] = median(_timed(everywhere.step, device, warm, tokens))
            what = f"{shape.name}: every expert resident{', gated' if one else ''}"
            yield Row(SECTION, what, f"{floors[one] * 1e3:.2f} ms", details={"seconds": floors[one]})

        def row(what: str, seconds: list[float], moved: float, compute: float, stats: dict[str, Any]) -> Row:
            floor = max(compute, moved / bandwidth)
            times, name = median(seconds), f"{shape.name}, {what}"
            figure = f"{times * 1e3:.2f} ms, {times / floor:.2f} of the floor of {floor * 1e3:.2f} ms"
            details = {"seconds": seconds, "floor_seconds": floor, "bytes_per_token": moved} | stats
            return Row(SECTION, name, figure, details=details)

        for fraction in FRACTIONS:
            slots = _slots(shape, fraction)
            for variant in PUBLISHED if shape.single is not None else BASE:
                what = f"{fraction:.0%}: {variant.name}"
                if time.monotonic() > limits.ends:
                    yield Row(SECTION, f"{shape.name}, {what}", "out of time", "", NOT_RUN)
                    continue
                cache.restart(CacheController(cache_shape(shape, nbytes), variant.setup(shape, slots)), None)
                demand = OnDemand(cache, shape, inputs[variant.gating], device)
                _timed(demand.step, device, 0, warm)
                before = _stats(cache)
                seconds = _timed(lambda number: demand.step(warm + number), device, 0, tokens)  # noqa: B023
                after = _stats(cache)
                stats = {key: (after[key] - before[key]) / tokens for key in after}
                yield row(what, seconds, stats["fetched_bytes"], floors[variant.gating], stats)
            cache.restart(CacheController(cache_shape(shape, nbytes), BASE[0].setup(shape, slots)), None)  # idle
            for one in gated:
                what = f"{fraction:.0%}: in place, in a graph{', gated' if one else ''}"
                if time.monotonic() > limits.ends:
                    yield Row(SECTION, f"{shape.name}, {what}", "out of time", "", NOT_RUN)
                    continue
                absent = _absent(shape, fraction, seed)
                runs = InPlace(_addresses(cache, store, shape, fraction, seed), shape, inputs[one], device)
                seconds = _timed(runs.step, device, warm, tokens)
                moved = float(np.mean([_bytes_in_place(ids, absent, nbytes) for ids in inputs[one].host_ids[warm:]]))
                yield row(what, seconds, moved, floors[one], {})
    finally:
        cache.close()


def _slots(shape: Shape, fraction: float) -> int:
    return max(shape.top_k + 1, round(fraction * shape.layers * shape.experts))


def _timed(step: Callable[[int], None], device: Device, warm: int, tokens: int) -> list[float]:
    """Seconds of each token; the host waits for a token's end, as it does to sample."""
    for number in range(warm):
        step(number)
    return [device.seconds(lambda: step(number)) for number in range(warm, warm + tokens)]  # noqa: B023


def _stats(cache: ExpertCacheManager) -> dict[str, float]:
    stats = cache.stats
    names = ("hits", "misses", "late", "prefetches", "prefetch_hits", "fetched_bytes", "wasted_bytes", "stall_seconds")
    return {name: getattr(stats, name) for name in names}


def _absent(shape: Shape, fraction: float, seed: int) -> np.ndarray:
    """Bool `[layers, experts]`: the same number of each layer, drawn at random."""
    order = np.random.default_rng(seed).random((shape.layers, shape.experts)).argsort(1).argsort(1)
    return order >= round(fraction * shape.experts)


def _addresses(cache: ExpertCacheManager, store: PinnedRecords, shape: Shape, fraction: float, seed: int) -> np.ndarray:
    """Table int64 `[layers, 2, experts]`: slots one after the other (with every expert resident, used several times,
    which no cache of the device is big enough to profit from), and host records for those that are absent."""
    pool, absent = cache.pool(0), _absent(shape, fraction, seed)
    pieces = list(pool.tensors.values())
    table = np.zeros((shape.layers, 2, shape.experts), dtype=np.int64)
    slot = 0
    for layer, one in np.ndindex(absent.shape):
        if absent[layer, one]:
            table[layer, :, one] = record_addresses(pool.layout, store.page_locked((layer, one)))
        else:
            table[layer, :, one] = [piece[slot % pool.num_slots].data_ptr() for piece in pieces]
            slot += 1
    return table


def _bytes_in_place(ids: np.ndarray, absent: np.ndarray, record_bytes: int) -> int:
    """That one token reads over the link; ids `[layers, top_k]`."""
    layers = np.arange(len(ids))[:, None]
    return int((absent[layers, ids] & (ids >= 0)).sum()) * record_bytes
