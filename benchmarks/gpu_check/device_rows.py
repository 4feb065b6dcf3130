"""Checks steps that the GPU decides, from a graph: outputs against the host's path, counters against a replay."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu_check.decoding import Inputs, OnDemand, OnDevice
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.report import CORRECTNESS, Row, verdict
from benchmarks.gpu_check.routing import draw_tokens
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import host_store, open_cache
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController

TOKENS = 12
EVICTION = "next_use"
"""The plugin's default policy."""


def check_on_device(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Checks the same tokens on demand and on the device, in two layers with slots for three quarters of the experts.

    With prefetch, so that every kind of copy and of eviction occurs.
    """
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    shape = shape.with_layers(2)
    inputs = Inputs(shape, draw_tokens(shape, TOKENS, seed), shape.single is not None, dtype, device)
    setup = CacheSetup([3 * shape.experts // 2], EVICTION, lookahead=1, max_experts=shape.top_k)
    cache = open_cache(host_store(shape, device, dtype, seed), shape, setup, device)
    try:
        demand = OnDemand(cache, shape, inputs, device)
        expected = [demand.step(number).clone() for number in range(TOKENS)]
        device.synchronize()
        cache.restart(cache.controller.empty_copy(), None)
        on_device = OnDevice(cache, shape, inputs, device, prefetch=True)
        on_device.give_back()
        cache.restart(cache.controller.empty_copy(), None)  # without the capture's events
        same = 0
        for number in range(TOKENS):
            output = on_device.step(number)
            device.synchronize()
            same += torch.equal(output, expected[number]) and bool(output.any()) and bool(output.isfinite().all())
        slots = on_device.decode.pools[0].download().slots
        on_device.give_back()  # the host evicts what is beyond its own share of the slots
        counted = _counters(cache.controller)
        # The GPU uses all slots for everything, so the replay sets none aside for prefetches. The cache counts bytes
        # that are moved, without the padding of records.
        moved = replace(cache.controller.shape, expert_bytes=[cache.pools[0].record_bytes] * shape.layers)
        replayed = replay(CacheController(moved, replace(setup, lookahead=0)), inputs)
    finally:
        cache.close()
    yield Row(
        CORRECTNESS, f"{shape.name}: decode on the device, in a graph, has the bits of decode on demand",
        f"{same} of {TOKENS} tokens", "all", verdict(same == TOKENS), {"seed": seed, **counted},
    )  # fmt: skip
    others = _counters(replayed)
    differing = [name for name in counted if counted[name] != others[name]]
    if not np.array_equal(slots, replayed.pools[0].slots):
        differing.append("slots")
    figure = f"{len(counted) + 1 - len(differing)} of {len(counted) + 1}"
    if differing:
        figure += f"; other {', '.join(differing)}"
    yield Row(
        CORRECTNESS, f"{shape.name}: the device's counters and slots are those of a replay on the host",
        figure, "all", verdict(not differing and cache.stats.hits > 0), {"seed": seed, "replay": others, **counted},
    )  # fmt: skip


def replay(controller: CacheController, inputs: Inputs) -> CacheController:
    """Decides every event of these tokens on the host, as the device does; returns the controller."""
    ids, ahead = inputs.ids.squeeze(2).cpu().numpy(), inputs.ahead.squeeze(2).cpu().numpy()
    layers, experts = ids.shape[1], controller.shape.num_experts[0]
    for number in range(len(ids)):
        for layer in range(layers):
            chosen, votes = ids[number, layer], None
            if layer + 1 < layers:
                predicted = ahead[number, layer + 1]
                votes = np.bincount(predicted[predicted >= 0], minlength=experts)
            controller.decide_on_device(layer, np.unique(chosen[chosen >= 0]).astype(np.int64), None, votes)
    return controller


def _counters(controller: CacheController) -> dict[str, int | list[int]]:
    stats = controller.stats
    names = "hits", "misses", "prefetches", "prefetch_hits", "prefetches_wasted", "fetched_bytes"
    counted: dict[str, int | list[int]] = {name: getattr(stats, name) for name in names}
    return counted | {"layer_hits": list(controller.layer_hits), "layer_misses": list(controller.layer_misses)}
