"""Checks the check's own kernel on a map from expert to slot, and slots that `Fetch` filled, against float64."""

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.expert_kernel import run_experts
from benchmarks.gpu_check.records import PinnedRecords, demand, expert, map_of
from benchmarks.gpu_check.report import CORRECTNESS, Row, verdict
from benchmarks.gpu_check.shapes import DOWN, GATE_UP, Shape
from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.device.fetch import Fetch

BATCHES = (1, 4, 16, 64)
DROPPED = 0.2
"""Share of (token, expert) pairs that are dropped."""

Weights = Callable[[int], dict[str, torch.Tensor]]
"""Function that returns the pieces of an expert on the device."""
Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs `[tokens, hidden]`, float32 weights and int32 ids `[tokens, top_k]`."""


def tolerance(dtype: torch.dtype) -> float:
    """Returns the error allowed relative to the largest output, for two roundings to `dtype`: between the projections
    and at the end."""
    return 2 * torch.finfo(dtype).eps


def draw(shape: Shape, tokens: int, dtype: torch.dtype, device: Device, seed: int, dropped: float = DROPPED) -> Routing:
    """Draws random tokens and their routing; distinct experts for each token, -1 if dropped."""
    generator = torch.Generator(device.torch).manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device.torch)

    x = torch.randn(tokens, shape.hidden, generator=generator, device=device.torch).to(dtype)
    weights = uniform(tokens, shape.top_k) + 0.1
    ids = uniform(tokens, shape.experts).argsort(1)[:, : shape.top_k].int()
    ids[uniform(tokens, shape.top_k) < dropped] = -1
    return x, weights / weights.sum(1, keepdim=True), ids


def reference(routing: Routing, weights_of: Weights) -> torch.Tensor:
    """Computes the layer's output in float64 on the device, expert by expert, without our kernels."""
    x, weights, ids = routing
    output = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for index in sorted(set(ids.view(-1).tolist()) - {-1}):
        token, choice = (ids == index).nonzero(as_tuple=True)
        pieces = weights_of(index)
        gate, up = (x[token].double() @ pieces[GATE_UP].double().T).chunk(2, dim=1)
        value = (torch.nn.functional.silu(gate) * up) @ pieces[DOWN].double().T
        output.index_add_(0, token, value * weights[token, choice, None].double())
    return output


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the greatest difference relative to the greatest expected value; infinite if any output is not finite."""
    error = (output.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(error) if bool(output.isfinite().all()) else float("inf")


def check_kernel(
    shape: Shape, device: Device, dtype: torch.dtype, seed: int, batches: tuple[int, ...] = BATCHES
) -> Iterator[Row]:
    """Checks the kernel on slots in random order, every second of them filled by `Fetch` from page-locked memory."""
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    layout, experts = shape.layout(dtype), shape.experts
    weights = [expert(shape, dtype, device, seed, (0, index)) for index in range(experts)]
    store, pool = PinnedRecords(layout, 1, experts, experts, device), SlotPool(layout, experts, device.torch)
    slots = torch.randperm(experts, generator=torch.Generator().manual_seed(seed)).tolist()
    fetched = range(1, experts, 2)
    for index in range(0, experts, 2):
        for name, piece in weights[index].items():
            pool.tensors[name][slots[index]].copy_(piece)
    for index in fetched:
        store.put(index, weights[index])
    in_slots = pool.tensors[GATE_UP], pool.tensors[DOWN], map_of(slots, device)
    gate_up, down = (torch.stack([each[name] for each in weights]) for name in (GATE_UP, DOWN))
    in_order = gate_up, down, map_of(range(experts), device)
    errors, same = {}, {}
    try:
        Fetch(pool)(demand(store, [((0, index), slots[index]) for index in fetched], device), 0)
        for tokens in batches:
            routing = draw(shape, tokens, dtype, device, seed + tokens)
            output = run_experts(*routing, *in_slots)
            errors[tokens] = difference(output, reference(routing, weights.__getitem__))
            same[tokens] = torch.equal(output, run_experts(*routing, *in_order))
    finally:
        device.synchronize()
        store.close()
    max_error, limit = max(errors.values()), tolerance(dtype)
    batch = ", ".join(map(str, batches))
    details = {"seed": seed, "dropped": DROPPED, "errors_by_batch": errors, "same_by_batch": same}
    yield Row(
        CORRECTNESS, f"{shape.name}: kernel on slots, half of them fetched by the GPU, batch {batch}, error",
        f"{max_error:.2e}", f"<= {limit:.2e}", verdict(max_error <= limit), details,
    )  # fmt: skip
    yield Row(
        CORRECTNESS, f"{shape.name}: the same bits with every expert copied by the host",
        f"{sum(same.values())} of {len(same)} batches", "all", verdict(all(same.values())), details,
    )  # fmt: skip
