"""Measures decoding with `fetch` against `in_place`, on the machine's link and with the model's experts."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.in_place import InPlaceDecode

ROUNDS = 5


@dataclass(frozen=True)
class DecodeTimes:
    """Decode times of one layer and one token by number of missing experts: medians in seconds."""

    misses: list[int]
    """Numbers of missing experts measured, ascending, from none to all."""
    fetch: list[float]
    in_place: list[float]

    def at(self, misses: float) -> tuple[float, float]:
        """Returns both times for a mean number of misses, interpolated."""
        fetch, in_place = (float(np.interp(misses, self.misses, times)) for times in (self.fetch, self.in_place))
        return fetch, in_place


def time_decode(cache: ExpertCacheManager, in_place: InPlaceDecode, top_k: int, dtype: torch.dtype) -> DecodeTimes:
    """Measures both ways on an unused cache, which has to be restarted afterwards.

    Both run `experts_by_address`, so that they differ only in where the experts are and whether the host waits.

    Args:
        cache: cache with a page-locked backing store.
        in_place: in-place decoding on that cache.
        top_k: experts per token.
        dtype: dtype of the model.
    """
    layers = [layer for layer in range(cache.store.num_layers) if cache.store.num_experts(layer) >= top_k]
    device = in_place.addresses.table.device
    counts = sorted({0, top_k // 4, top_k // 2, top_k})
    times: dict[tuple[str, int], list[float]] = {(way, m): [] for way in ("fetch", "in_place") for m in counts}
    for number in range(ROUNDS + 1):  # the first compiles
        layer = layers[number % len(layers)]
        hidden = cache.store.layouts[layer].pieces[0].shape[-1]
        x = torch.zeros(1, hidden, dtype=dtype, device=device)
        weights = torch.ones(1, top_k, device=device)
        for misses in counts:
            experts = np.random.default_rng(number).permutation(cache.store.num_experts(layer))[:top_k].tolist()
            ids = torch.tensor([experts], dtype=torch.int32, device=device)
            _empty(cache)
            present = sorted(experts[misses:])
            cache.acquire(layer, present)
            cache.release(layer, present)
            for way, run in (("in_place", _run_in_place), ("fetch", _run_fetched)):
                _synchronize(device)
                start = time.perf_counter()
                run(cache, in_place, layer, x, weights, ids)
                _synchronize(device)
                if number:
                    times[way, misses].append(time.perf_counter() - start)
    fetch, read = ([float(np.median(times[way, m])) for m in counts] for way in ("fetch", "in_place"))
    return DecodeTimes(counts, fetch, read)


def _run_in_place(
    cache: ExpertCacheManager, in_place: InPlaceDecode, layer: int, x: torch.Tensor, *routing: torch.Tensor
) -> None:
    weights, ids = routing
    with cache.frozen() as slots:
        in_place.addresses.publish(slots)
        gate_up, down = in_place.addresses.table[:, layer]
        in_place.kernel(x, weights, ids, gate_up, down, in_place.inner[layer])


def _run_fetched(
    cache: ExpertCacheManager, in_place: InPlaceDecode, layer: int, x: torch.Tensor, *routing: torch.Tensor
) -> None:
    experts = sorted(routing[1].cpu().view(-1).tolist())  # the host reads the routing
    cache.acquire(layer, experts)
    _run_in_place(cache, in_place, layer, x, *routing)
    cache.release(layer, experts)


def _empty(cache: ExpertCacheManager) -> None:
    cache.restart(cache.controller.empty_copy(), None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
