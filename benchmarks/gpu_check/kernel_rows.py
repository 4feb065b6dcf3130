"""Checks the kernel on a table of addresses, in slots and in page-locked host memory, against float64."""

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.records import PinnedRecords, addresses, expert, pieces_of
from benchmarks.gpu_check.report import CORRECTNESS, Row, verdict
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.device.experts_by_address import experts_by_address
from vllm_adapmoe.device.in_place import DOWN, GATE_UP

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
    """Checks the kernel with every second expert in page-locked memory and the others in slots."""
    if not device.reads_host():
        raise RuntimeError("this device cannot use the host's addresses of page-locked memory")
    layout = shape.layout(dtype)
    slots = [expert(shape, dtype, device, seed, (0, index)) for index in range(shape.experts)]
    store = PinnedRecords(layout, 1, shape.experts, shape.experts, device)
    for index in range(1, shape.experts, 2):
        store.put(index, slots[index])
    hosts = [pieces_of(layout, store.page_locked((0, index))) for index in range(shape.experts)]
    resident = addresses(slots, device)
    mixed = addresses([hosts[index] if index % 2 else slots[index] for index in range(shape.experts)], device)
    errors, same = {}, {}
    try:
        for tokens in batches:
            routing = draw(shape, tokens, dtype, device, seed + tokens)
            output = experts_by_address(*routing, *mixed, shape.inner)
            errors[tokens] = difference(output, reference(routing, slots.__getitem__))
            same[tokens] = torch.equal(output, experts_by_address(*routing, *resident, shape.inner))
    finally:
        store.close()
    max_error, limit = max(errors.values()), tolerance(dtype)
    batch = ", ".join(map(str, batches))
    details = {"seed": seed, "dropped": DROPPED, "errors_by_batch": errors, "same_by_batch": same}
    yield Row(
        CORRECTNESS, f"{shape.name}: kernel, slots and host mixed, batch {batch}, error against float64",
        f"{max_error:.2e}", f"<= {limit:.2e}", verdict(max_error <= limit), details,
    )  # fmt: skip
    yield Row(
        CORRECTNESS, f"{shape.name}: the same bits with every expert in a slot",
        f"{sum(same.values())} of {len(same)} batches", "all", verdict(all(same.values())), details,
    )  # fmt: skip
