"""Checks the expert cache with real transfers: slot contents, steps in waves, and refills of slots in use."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.expert_kernel import run_experts
from benchmarks.gpu_check.kernel_rows import difference, draw, tolerance
from benchmarks.gpu_check.records import expert, map_of
from benchmarks.gpu_check.report import CORRECTNESS, NOT_RUN, Row, verdict
from benchmarks.gpu_check.shapes import DOWN, GATE_UP, Shape
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import waves
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.host import HostStore

EVENTS = 24
WAVE_TOKENS = 16
REFILLS = 4


def cache_shape(shape: Shape, record_bytes: int) -> CacheShape:
    """Returns the shape of a cache with one pool."""
    layers = shape.layers
    return CacheShape([shape.experts] * layers, shape.top_k, [0] * layers, [record_bytes] * layers)


def host_store(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> HostStore:
    """Makes the plugin's host store, filled with experts of known values."""
    store = HostStore(device.torch)
    for layer in range(shape.layers):
        pieces: dict[str, torch.Tensor] = {}
        for index in range(shape.experts):
            for name, piece in expert(shape, dtype, device, seed, (layer, index)).items():
                pieces.setdefault(name, torch.empty(shape.experts, *piece.shape, dtype=dtype))[index].copy_(piece)
        store.put_layer(layer, pieces)
    return store.seal()


def open_cache(store: ExpertStore, shape: Shape, setup: CacheSetup, device: Device) -> ExpertCacheManager:
    """Opens the plugin's cache on a store."""
    return ExpertCacheManager(store, CacheController(cache_shape(shape, store.layouts[0].nbytes), setup), device.torch)


def slots_of(cache: ExpertCacheManager, layer: int, device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what a kernel reads of a layer: both tensors of slots, and the map from expert to slot as it is now."""
    tensors = cache.pool(layer).tensors
    return tensors[GATE_UP], tensors[DOWN], map_of(cache.slot_maps[layer].tolist(), device)


def check_slots(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Checks that slots hold the store's bytes after random events with prefetch, and at the end."""
    shape = shape.with_layers(2)
    store = host_store(shape, device, dtype, seed)
    setup = CacheSetup([shape.experts + max(2, shape.experts // 4)], "lru", lookahead=1, max_experts=shape.top_k)
    cache = open_cache(store, shape, setup, device)
    chance = random.Random(seed)
    compared = differing = 0

    def ahead(layer: int, ids: list[int]) -> None:
        predicted = np.array([chance.sample(range(shape.experts), shape.top_k)])
        kept = np.ones_like(predicted, dtype=bool)
        routing = np.array([ids[: shape.top_k]])
        cache.prefetch(layer, (routing, np.ones_like(routing, dtype=bool)), lambda _: PredictedExperts(predicted, kept))

    def compare(layer: int, experts: list[int]) -> None:
        nonlocal compared, differing
        pool, slot_map = cache.pool(layer), cache.slot_maps[layer].tolist()
        for index in experts:
            expected = expert(shape, dtype, device, seed, (layer, index))
            slot = slot_map[index]
            same = slot >= 0 and all(_same_bits(pool.tensors[name][slot], piece) for name, piece in expected.items())
            compared, differing = compared + 1, differing + (not same)

    try:
        for event in range(EVENTS):
            layer = event % shape.layers
            experts = sorted(chance.sample(range(shape.experts), chance.randint(1, min(shape.experts, 64))))
            acquisition = cache.begin(layer, experts)
            ahead(layer, experts)
            cache.wait(acquisition)
            compare(layer, experts)
            cache.release(layer, experts)
        for layer in range(shape.layers):
            compare(layer, (cache.slot_maps[layer] >= 0).nonzero().view(-1).tolist())
        stats = cache.stats
        details = {
            "seed": seed, "events": EVENTS, "slots": setup.slots[0], "hits": stats.hits, "misses": stats.misses,
            "prefetches": stats.prefetches,
        }  # fmt: skip
    finally:
        cache.close()
    yield Row(
        CORRECTNESS, f"{shape.name}: slots hold the store's bytes after random requests",
        f"{differing} of {compared} differ", "0", verdict(differing == 0 and compared > 0), details,
    )  # fmt: skip


def _same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def check_waves(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Checks a step with more experts than slots, run in waves, against one kernel on all of them."""
    shape = shape.with_layers(1)
    store = host_store(shape, device, dtype, seed)
    x, weights, ids = draw(shape, WAVE_TOKENS, dtype, device, seed)
    experts = sorted(set(ids.view(-1).tolist()) - {-1})
    cache = open_cache(store, shape, CacheSetup([max(1, len(experts) // 3)]), device)
    total = torch.zeros(x.shape, dtype=torch.float32, device=device.torch)
    groups = waves(experts, cache.capacity(0))
    try:
        for group in groups:
            cache.acquire(0, group, experts)
            in_wave = torch.isin(ids, torch.tensor(group, dtype=ids.dtype, device=device.torch))
            total += run_experts(x, weights, torch.where(in_wave, ids, -1), *slots_of(cache, 0, device)).float()
            cache.release(0, group)
    finally:
        cache.close()
    everyone = [expert(shape, dtype, device, seed, (0, index)) for index in range(shape.experts)]
    gate_up, down = (torch.stack([each[name] for each in everyone]) for name in (GATE_UP, DOWN))
    error = difference(total, run_experts(x, weights, ids, gate_up, down, map_of(range(shape.experts), device)))
    limit = tolerance(dtype)
    yield Row(
        CORRECTNESS, f"{shape.name}: {len(experts)} experts in {len(groups)} waves, difference to all resident",
        f"{error:.2e}", f"<= {limit:.2e}", verdict(error <= limit and len(groups) > 1),
        {"seed": seed, "slots": cache.num_slots},
    )  # fmt: skip


def check_refills(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Checks that a slot read by a queued kernel is refilled only after that kernel."""
    shape = replace(shape, layers=1, experts=2, top_k=1)
    cache = open_cache(host_store(shape, device, dtype, seed), shape, CacheSetup([1]), device)
    x, weights, _ = draw(shape, WAVE_TOKENS, dtype, device, seed)
    old = beside = 0
    device.keep_busy()
    try:
        for number in range(REFILLS):
            used, unused = number % 2, 1 - number % 2
            ids = torch.full((WAVE_TOKENS, 1), used, dtype=torch.int32, device=device.torch)
            cache.acquire(0, [used])
            slots = slots_of(cache, 0, device)
            expected = run_experts(x, weights, ids, *slots)
            device.synchronize()
            device.keep_busy()
            output = run_experts(x, weights, ids, *slots)
            has_run = device.mark()
            cache.release(0, [used])
            beside += not has_run()
            cache.acquire(0, [unused])
            cache.release(0, [unused])
            old += torch.equal(output, expected)
    finally:
        cache.close()
    judged = verdict(old == REFILLS) if old < REFILLS or beside or not device.cuda else NOT_RUN
    yield Row(
        CORRECTNESS, f"{shape.name}: a slot is refilled after the kernel that reads it, not before",
        f"{old} of {REFILLS} as before, {beside} with the kernel still to run", "all", judged, {"seed": seed},
    )  # fmt: skip
