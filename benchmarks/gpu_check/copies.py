"""Measures the cache's copies, of the host and of the GPU, against one plain copy, overlap, and the GPU's decisions."""

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.expert_kernel import run_experts
from benchmarks.gpu_check.kernel_rows import draw
from benchmarks.gpu_check.records import PinnedRecords, demand, expert
from benchmarks.gpu_check.report import Row, verdict
from benchmarks.gpu_check.shapes import Shape
from benchmarks.gpu_check.slot_rows import cache_shape, open_cache, slots_of
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.claim import claim
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.fetch import Fetch
from vllm_adapmoe.device.layer_input import Chosen
from vllm_adapmoe.device.residency import COUNTERS, DeviceResidency, Loads
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.results import rotated, spread

SECTION = "copies"
ROUNDS = 5
TARGET = 0.95
"""Required share of the plain copy's bandwidth."""
PLAIN_BYTES = 4 << 30
"""Maximum bytes of a plain copy."""
LAYERS = 3
"""Layers of the model that is copied; slots for two of them, so that every request misses."""


def pinned_model(shape: Shape, dtype: torch.dtype, device: Device, records: int, seed: int) -> PinnedRecords:
    """Makes page-locked records of random weights for all experts of a model."""
    store = PinnedRecords(shape.layout(dtype), shape.layers, shape.experts, records, device)
    weights = expert(shape, dtype, device, seed, (0, 0))  # the same for all: values do not affect copies
    for index in range(records):
        store.put(index, weights)
    return store


def plain_copy(store: PinnedRecords, device: Device) -> Callable[[], float]:
    """Returns a function that copies the store's memory once, up to `PLAIN_BYTES`, and returns bytes per second."""
    source = store.memory[:PLAIN_BYTES]
    destination = torch.empty_like(source, device=device.torch)
    return lambda: len(source) / device.seconds(lambda: destination.copy_(source, non_blocking=True))


def check_copies(shape: Shape, device: Device, dtype: torch.dtype, seed: int, rounds: int = ROUNDS) -> Iterator[Row]:
    """Measures the bandwidth of one, `top_k` and all experts at a time, requested by the host and fetched by the GPU.

    Then how copies overlap with kernels, and the time in which the GPU decides.
    """
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    whole, shape = shape, shape.with_layers(LAYERS)
    records = min(max(1, PLAIN_BYTES // shape.layout(dtype).nbytes), LAYERS * shape.experts)
    store = pinned_model(shape, dtype, device, records, seed)
    plain = plain_copy(store, device)
    cache = open_cache(store, shape, CacheSetup([2 * shape.experts]), device)
    sizes = sorted({1, shape.top_k, shape.experts})
    try:
        by_size: dict[int, list[float]] = {size: [] for size in sizes}
        by_gpu: dict[int, list[float]] = {size: [] for size in sizes}
        bandwidths = []
        fetch_all(cache, shape, shape.experts)
        replays = {size: gpu_fetches(cache, shape, size, device) for size in sizes}
        all_bytes = shape.layers * shape.experts * store.layouts[0].nbytes
        for replay in replays.values():
            replay()
        plain()
        for number in range(rounds):
            bandwidths.append(plain())
            for size in rotated(sizes, number):
                before = cache.stats.fetched_bytes
                seconds = device.seconds(lambda: fetch_all(cache, shape, size))  # noqa: B023 - called at once
                by_size[size].append((cache.stats.fetched_bytes - before) / seconds)
                by_gpu[size].append(all_bytes / device.seconds(replays[size]))
        speed = spread([bandwidth / 1e9 for bandwidth in bandwidths])
        details = {"plain_gbps": speed, "plain_bytes": len(store.memory), "record_bytes": store.layouts[0].nbytes}
        yield Row(SECTION, "plain page-locked copy", f"{speed['median']:.2f} GB/s", details=details)
        ways = [("requests", by_size), ("fetches by the GPU", by_gpu)]
        for way, size, measured in ((way, *item) for way, by in ways for item in by.items()):
            ratio = spread([speed / bandwidth for speed, bandwidth in zip(measured, bandwidths, strict=True)])
            yield Row(
                SECTION, f"{shape.name}: {way} of {size} of {shape.experts} experts, of the plain copy",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})", f">= {TARGET}",
                verdict(ratio["median"] >= TARGET),
                {"ratio": ratio, "gbps": spread([speed / 1e9 for speed in measured])},
            )  # fmt: skip
        yield _overlap(cache, shape, device, dtype, seed, rounds)
        yield from claim_times(whole, device, rounds)
    finally:
        cache.close()


def fetch_all(cache: ExpertCacheManager, shape: Shape, together: int) -> None:
    """Requests every expert once, `together` at a time."""
    for layer in range(shape.layers):
        for start in range(0, shape.experts, together):
            experts = list(range(start, min(start + together, shape.experts)))
            cache.acquire(layer, experts)
            cache.release(layer, experts)


def gpu_fetches(cache: ExpertCacheManager, shape: Shape, together: int, device: Device) -> Callable[[], object]:
    """Returns the replay of a graph that fetches every expert once, `together` in a launch, into any slots.

    The cache does not know of it, so that its slots hold other experts than it believes: all have the same weights.
    """
    fetch, slots = Fetch(cache.pools[0]), cache.pools[0].num_slots
    lists = []
    for layer in range(shape.layers):
        for start in range(0, shape.experts, together):
            experts = range(start, min(start + together, shape.experts))
            copies = [((layer, index), (layer * shape.experts + index) % slots) for index in experts]
            lists.append(demand(cache.store, copies, device))

    def fetch_each() -> None:
        for loads in lists:
            fetch(loads, 0)

    return device.capture(fetch_each)


def claim_times(shape: Shape, device: Device, rounds: int) -> Iterator[Row]:
    """Times `claim` alone, in a graph, in all layers of a model with half of its experts resident: no copies.

    Misses: all experts in turn, which LRU never has any more when they are used again. Hits: the same few again.
    """
    slots = max(shape.layers * shape.top_k, shape.layers * shape.experts // 2)
    controller = CacheController(cache_shape(shape, 1), CacheSetup([slots]))
    records = torch.ones(shape.layers, shape.experts, dtype=torch.int64, device=device.torch)
    state, loads = DeviceResidency(controller.pools[0], records, device.torch), Loads(shape.experts, device.torch)
    routing = DeferredRouting(shape.layers, 1, shape.top_k, device.torch)
    routing.begin_step(1)
    state.upload(controller.pools[0], [])
    everyone = torch.arange(shape.experts, dtype=torch.int32, device=device.torch)
    chunks = everyone[: shape.experts // shape.top_k * shape.top_k].view(-1, 1, shape.top_k)
    for what, routings in ((f"{shape.top_k} misses", chunks), ("hits only", chunks[:1].expand(len(chunks), -1, -1))):

        def decide(routings: torch.Tensor = routings) -> None:
            for ids in routings:  # layer by layer, as in a step
                for layer in range(shape.layers):
                    claim(state, loads, layer, Chosen(ids), routing)

        events = len(routings) * shape.layers
        replay = device.capture(decide)
        replay()
        state.counters.zero_()
        seconds = spread([device.seconds(replay) / events for _ in range(rounds)])
        hits, misses = (state.counters[len(COUNTERS) + place :: 2].sum().item() / rounds / events for place in (0, 1))
        yield Row(
            SECTION, f"{shape.name}: deciding one layer on the GPU, {what}",
            f"{seconds['median'] * 1e6:.1f} us ({seconds['min'] * 1e6:.1f} .. {seconds['max'] * 1e6:.1f})",
            details={"seconds": seconds, "hits": hits, "misses": misses, "slots": slots},
        )  # fmt: skip


def _overlap(
    cache: ExpertCacheManager, shape: Shape, device: Device, dtype: torch.dtype, seed: int, rounds: int
) -> Row:
    """Times kernels on one layer's experts and a request for all of another layer's, alone and together."""
    x, weights, ids = draw(shape, 1, dtype, device, seed, dropped=0.0)
    everyone = list(range(shape.experts))
    cache.acquire(0, everyone)
    slots = slots_of(cache, 0, device)

    def kernels(count: int) -> None:
        for _ in range(count):
            run_experts(x, weights, ids, *slots)

    def fetch(layer: int) -> Callable[[], object]:
        return lambda: cache.acquire(layer, everyone)

    def both(layer: int, busy: Callable[[], object]) -> None:
        busy()
        cache.acquire(layer, everyone)

    kernels(1)
    layers = [1, 2]  # each in turn evicts the other

    def other_layer() -> int:
        layers.reverse()
        return layers[0]

    def timed(action: Callable[[], object], layer: int) -> float:
        seconds = device.seconds(action)
        cache.release(layer, everyone)
        return seconds

    layer = other_layer()
    timed(fetch(layer), layer)
    layer = other_layer()
    copy = timed(fetch(layer), layer)
    count = max(1, round(copy / (device.seconds(lambda: kernels(16)) / 16)))
    busy = device.capture(lambda: kernels(count))  # one launch, so that the copy is not delayed by the host
    shares, times = [], []
    for _ in range(rounds):
        compute = device.seconds(busy)
        layer = other_layer()
        copy = timed(fetch(layer), layer)
        layer = other_layer()
        together = timed(lambda: both(layer, busy), layer)  # noqa: B023 - called at once
        times.append({"compute": compute, "copy": copy, "both": together})
        shares.append((compute + copy - together) / min(compute, copy))
    cache.release(0, everyone)
    share = spread(shares)
    return Row(
        SECTION, f"{shape.name}: kernels beside a request of {shape.experts} experts, share of the shorter hidden",
        f"{share['median']:.2f} ({share['min']:.2f} .. {share['max']:.2f})",
        details={"hidden": share, "seconds": times, "kernel_calls": count},
    )  # fmt: skip
