"""Checks decode steps that read experts in place, from a graph, against steps that fetch them first."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_check.decoding import InPlace, Inputs, OnDemand
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.report import CORRECTNESS, Row, verdict
from benchmarks.gpu_check.routing import draw_tokens
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import host_store, open_cache
from vllm_adapmoe.policy.cache_setup import CacheSetup

TOKENS = 12


def check_in_place(shape: Shape, device: Device, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Checks the same tokens on demand and in place, in two layers with slots for three quarters of the experts."""
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    shape = shape.with_layers(2)
    inputs = Inputs(shape, draw_tokens(shape, TOKENS, seed), shape.single is not None, dtype, device)
    cache = open_cache(host_store(shape, device, dtype, seed), shape, CacheSetup([3 * shape.experts // 2]), device)
    try:
        demand = OnDemand(cache, shape, inputs, device)
        expected = [demand.step(number).clone() for number in range(TOKENS)]
        device.synchronize()
        cache.restart(cache.controller.empty_copy(), None)
        in_place = InPlace(cache, shape, inputs, device)
        same = 0
        for number in range(TOKENS):
            output = in_place.step(number)
            device.synchronize()
            same += torch.equal(output, expected[number]) and bool(output.any()) and bool(output.isfinite().all())
        stats = cache.stats
        details = {"seed": seed, "in_place": stats.in_place, "caught_up": stats.caught_up, "hits": stats.hits}
    finally:
        cache.close()
    yield Row(
        CORRECTNESS, f"{shape.name}: decode in place, in a graph, has the bits of decode on demand",
        f"{same} of {TOKENS} tokens", "all", verdict(same == TOKENS), details,
    )  # fmt: skip
