"""Computes what a decode step of one request costs, by how missing experts are handled: nothing here is measured.

Every time is a lower bound of the kind of a roofline: weights are read once at the memory's full bandwidth, a kernel
adds a fixed time, the KV cache is empty, and sampling and the host's work between steps take no time. What is compared
is one model in one format: llama.cpp's own formats have other bytes.

Symbols: L MoE layers, k experts of a token, E bytes of an expert, h hit rate, r resident share of the experts.
"""

import math
from dataclasses import dataclass

from vllm_adapmoe.planning.memory_plan import ModelSize
from vllm_adapmoe.planning.token_time import (
    DECIDING_KERNELS,
    HOST_LAYER_SECONDS,
    KERNEL_SECONDS,
    LAYER_KERNELS,
    compute_seconds,
    kernel_bandwidth,
    token_seconds,
)

PREDICTING_KERNELS = 4
"""Kernels that predict the next layer's experts before the claim: input to float32, gate, two for the best
(`ExpertPredictor.predict_on_device`)."""
PREFETCH_KERNELS = 1
"""Kernels of a prefetch on a stream of its own: fetch."""
SYNC_SECONDS = 3e-5
"""Time of handing a layer to the host's cores and back: two copies of a few KB and one synchronisation of about 10 us
each. Assumed; 20 to 50 us would be as credible."""
SYNC_COPIES = 2
"""Copies of such a handover: the layer's input to the host, its output to the device."""


@dataclass(frozen=True)
class GpuSpeed:
    """Speeds of a GPU and of its host."""

    name: str
    memory_bandwidth: float
    """Bytes per second at which kernels read device memory."""
    link: float
    """Bytes per second of a plain page-locked copy to the device."""
    fetch_share: float
    """Share of `link` that a kernel gets which reads host memory."""
    kernel_seconds: float = KERNEL_SECONDS
    sync_seconds: float = SYNC_SECONDS

    @classmethod
    def of(cls, name: str, memory_bandwidth: float, link: float) -> "GpuSpeed":
        """Returns a GPU whose kernels read over the link as fast as was measured (`token_time.KERNEL_LINK`)."""
        return cls(name, memory_bandwidth, link, kernel_bandwidth(link) / link)

    @property
    def fetch_bandwidth(self) -> float:
        """Bytes per second at which a kernel reads host memory."""
        return self.link * self.fetch_share


@dataclass(frozen=True)
class DecodeModel:
    """What one token of a model reads; all its MoE layers are alike."""

    name: str
    size: ModelSize
    router_bytes: int
    """Bytes of a MoE layer's router and shared experts; part of `size.read_bytes`."""
    hidden: int
    layer_kernels: int = LAYER_KERNELS
    """Kernels of one layer of stock vLLM."""

    @property
    def layer_expert_bytes(self) -> int:
        """Bytes of the experts that a token activates in one layer, k E."""
        return self.size.top_k * self.size.expert_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts that a token activates in all layers, L k E."""
        return self.size.num_layers * self.layer_expert_bytes


@dataclass(frozen=True)
class LayerCost:
    """What a MoE layer launches and moves for one token, its attention's weights left out."""

    kernels: int
    side_kernels: int = 0
    """Kernels of a second stream, beside the others."""
    copies: int = 0
    """Copies that the host launches."""
    syncs: float = 0.0
    """Times that host and device wait for each other."""
    device_read: float = 0.0
    """Bytes read of device memory: router, shared and routed experts."""
    device_written: float = 0.0
    """Bytes of experts written to slots; beside the link, so no time is counted for them."""
    link: float = 0.0
    """Bytes over the link."""
    host_read: float = 0.0
    """Bytes of weights that the host's cores read."""


def layer_costs(model: DecodeModel, hit_rate: float, resident: float) -> dict[str, LayerCost]:
    """Returns the cost of an average MoE layer by way of handling missing experts.

    Args:
        model: the model.
        hit_rate: share of the activated experts that are in slots, h; where the plugin moves them.
        resident: share of the experts that are on the device, r; where they stay where they are.
    """
    experts, router = model.layer_expert_bytes, model.router_bytes
    missing, absent = (1 - hit_rate) * experts, (1 - resident) * experts
    kernels = model.layer_kernels
    loads = math.ceil(round((1 - hit_rate) * model.size.top_k, 9))
    activations = SYNC_COPIES * 2 * model.hidden
    return {
        "stock": LayerCost(kernels, device_read=router + experts),
        "device": LayerCost(
            kernels + DECIDING_KERNELS, device_read=router + experts, device_written=missing, link=missing
        ),
        "device_prefetch": LayerCost(
            kernels + DECIDING_KERNELS + PREDICTING_KERNELS,
            PREFETCH_KERNELS,
            device_read=2 * router + experts,
            device_written=missing,
            link=missing,
        ),
        "host": LayerCost(
            kernels, copies=1 + loads, syncs=1, device_read=router + experts, device_written=missing, link=missing
        ),
        "uva": LayerCost(kernels, device_read=router + experts - absent, link=absent),
        "llama_cpp": LayerCost(
            kernels,
            copies=SYNC_COPIES,
            syncs=1 - resident,
            device_read=router + experts - absent,
            link=(1 - resident) * activations,
            host_read=absent,
        ),
    }


def stock_seconds(model: DecodeModel, gpu: GpuSpeed) -> float:
    """Returns the time of a token of stock vLLM with every expert resident, s."""
    return _compute(model, gpu, model.expert_bytes)


def decided_on_device(
    model: DecodeModel,
    gpu: GpuSpeed,
    hit_rate: float,
    prefetch: bool = False,
    recall: float = 1.0,
    precision: float = 1.0,
) -> float:
    """Returns the time of a token whose decode step is decided on the device, s.

    Without prefetch: `stock + L * deciding + (1 - h) L k E / fetch bandwidth`. A prefetch runs from one layer's
    claim to the next layer's, so it has the kernels of one layer to hide behind, minus its own; predicting takes time.

    Args:
        model: the model.
        gpu: its device.
        hit_rate: share of the activated experts that are in slots without prefetch, h.
        prefetch: whether the next layer's missing experts are fetched beside computing.
        recall: share of the missing experts that are predicted; 1: an upper bound of what prefetch can do.
        precision: share of the predicted experts that are used.
    """
    stock = stock_seconds(model, gpu)
    missing = (1 - hit_rate) * model.expert_bytes / gpu.fetch_bandwidth
    decide = model.size.num_layers * DECIDING_KERNELS * gpu.kernel_seconds
    if not prefetch:
        return token_seconds(stock, missing, decide)
    decide += model.size.num_layers * PREDICTING_KERNELS * gpu.kernel_seconds
    predicted = missing * recall / precision
    window = stock - model.size.num_layers * PREFETCH_KERNELS * gpu.kernel_seconds
    return token_seconds(stock, missing * (1 - recall) + predicted, decide, min(predicted, max(0.0, window)))


def decided_on_host(
    model: DecodeModel, gpu: GpuSpeed, hit_rate: float, layer_seconds: float = HOST_LAYER_SECONDS
) -> float:
    """Returns the time of a token for which the host decides every layer and launches plain copies, s.

    Args:
        model: the model.
        gpu: its device.
        hit_rate: share of the activated experts that are in slots, h.
        layer_seconds: the host's time in a MoE layer, s.
    """
    missing = (1 - hit_rate) * model.expert_bytes / gpu.link
    return token_seconds(stock_seconds(model, gpu), missing, model.size.num_layers * layer_seconds)


def uva(model: DecodeModel, gpu: GpuSpeed, resident: float) -> float:
    """Returns the time of a token with vLLM's UVA offloading of routed experts, s.

    It offloads whole parameters, all experts of a layer together, and its kernels read the activated ones over the
    link, every time. That nothing but experts is offloaded needs `cpu_offload_params`; by default attention is, too.

    Args:
        model: the model.
        gpu: its device.
        resident: share of the experts on the device, r.
    """
    absent = (1 - resident) * model.expert_bytes
    return token_seconds(_compute(model, gpu, model.expert_bytes - absent), absent / gpu.fetch_bandwidth)


def llama_cpp(model: DecodeModel, gpu: GpuSpeed, resident: float, host_bandwidth: float) -> float:
    """Returns the time of a token with the experts of some layers on the host's cores, s (`--n-cpu-moe`).

    Favours llama.cpp: what the host spends on launches is left out, although a graph that is split at these layers is
    not one CUDA graph, and its cores are taken to read at the full bandwidth.

    Args:
        model: the model.
        gpu: its device.
        resident: share of the layers whose experts are on the device, r.
        host_bandwidth: bytes per second at which the host's cores read weights.
    """
    absent = (1 - resident) * model.expert_bytes
    handovers = (1 - resident) * model.size.num_layers * gpu.sync_seconds
    return token_seconds(_compute(model, gpu, model.expert_bytes - absent), absent / host_bandwidth, handovers)


def misses_on_host(model: DecodeModel, gpu: GpuSpeed, hit_rate: float, host_bandwidth: float) -> float:
    """Returns the time of a token with the same cache whose misses the host's cores compute, s.

    The host has to see the routing of every layer, so every layer is handed over, with or without a miss. That hits are
    computed meanwhile is not counted: they take less than a handover in all but the largest experts.

    Args:
        model: the model.
        gpu: its device.
        hit_rate: share of the activated experts that are in slots, h.
        host_bandwidth: bytes per second at which the host's cores read weights.
    """
    missing = (1 - hit_rate) * model.expert_bytes
    handovers = model.size.num_layers * gpu.sync_seconds
    return token_seconds(_compute(model, gpu, model.expert_bytes - missing), missing / host_bandwidth, handovers)


def break_even_bandwidth(model: DecodeModel, gpu: GpuSpeed, hit_rate: float) -> float:
    """Returns the host memory bandwidth from which on `misses_on_host` is faster than `decided_on_device`, bytes/s.

    With m = (1 - h) k E bytes missing per layer, F the fetch bandwidth, M the device memory's, c deciding and s
    the handover, both times are equal at `B = m / (m / F + m / M + c - s)`. Infinite: no host is fast enough, since the
    handover alone takes longer.
    """
    missing = (1 - hit_rate) * model.layer_expert_bytes
    fetching = missing / gpu.fetch_bandwidth + missing / gpu.memory_bandwidth + DECIDING_KERNELS * gpu.kernel_seconds
    spare = fetching - gpu.sync_seconds
    return missing / spare if missing > 0 and spare > 0 else math.inf


def overtaking_hit_rate(model: DecodeModel, gpu: GpuSpeed, seconds: float) -> float | None:
    """Returns the hit rate from which on `decided_on_device`, without prefetch, takes less than `seconds` a token.

    None: not even if every expert is hit. 0: at any.
    """
    spare = seconds - decided_on_device(model, gpu, 1.0)
    if spare < 0:
        return None
    return max(0.0, 1 - spare * gpu.fetch_bandwidth / model.expert_bytes)


def device_faster_from(model: DecodeModel, gpu: GpuSpeed, host_layer_seconds: float = HOST_LAYER_SECONDS) -> float:
    """Returns the hit rate from which on deciding on the device is faster than on the host.

    The device saves the host's time in every layer, but its kernel may get less of the link than a plain copy. 0: at
    any.

    Args:
        model: the model.
        gpu: its device.
        host_layer_seconds: the host's time in a MoE layer, s.
    """
    saved = model.size.num_layers * (host_layer_seconds - DECIDING_KERNELS * gpu.kernel_seconds)
    lost = model.expert_bytes * (1 / gpu.fetch_bandwidth - 1 / gpu.link)
    return 0.0 if saved >= lost else 1 - saved / lost


def _compute(model: DecodeModel, gpu: GpuSpeed, expert_bytes: float) -> float:
    """Returns the time of the device's kernels if they read `expert_bytes` of experts from device memory, s."""
    kernels = model.size.all_layers * model.layer_kernels
    return compute_seconds(model.size.read_bytes + expert_bytes, gpu.memory_bandwidth, kernels, gpu.kernel_seconds)
