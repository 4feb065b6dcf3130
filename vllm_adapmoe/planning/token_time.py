"""Computes the time of one token from its parts: the one formula behind `adapmoe plan` and `decode_cost`."""

KERNEL_SECONDS = 2e-6
"""Time of one kernel inside a CUDA graph beside its bytes: start, first loads and end. Assumed. An upper bound is
measured: MoE layers of three kernels each, in a graph, took 4.8 us a kernel longer than their bytes (docs/gpu.md,
H200)."""
LAYER_KERNELS = 16
"""Kernels of one layer of stock vLLM, counted for Qwen3-MoE with one request: norm, QKV, norm of Q and of K, rotation,
KV cache, attention, output, norm, router, top-k, sorting of pairs, two expert kernels, activation, sum."""
DECIDING_KERNELS = 4
"""Kernels that a MoE layer has besides where the device decides, counted in `MappedExperts`, `DeviceDecode.experts` and
`slot_kernels`: claim, fetch, and two that map the sorted blocks to slots; one where the pairs are not sorted."""
KERNEL_LINK = 37e9
"""Bytes per second that a kernel reads over the link at most: 37 GB/s of a link of 55 (docs/gpu.md, H200). That a
kernel has a slower link to itself is assumed."""
HOST_LAYER_SECONDS = 3e-4
"""Time that a MoE layer takes above its bytes where the host decides: reads routing, decides, launches copies. Measured
on an H200 with half of the experts resident (docs/gpu.md)."""


def token_seconds(compute: float, link: float, decide: float = 0.0, beside: float = 0.0) -> float:
    """Returns the time of one token: what is moved adds to computing, but for what is moved beside it.

    Args:
        compute: time of its kernels with every expert resident, s.
        link: time of moving what is missing, s.
        decide: time of decisions and launches that computing waits for, s.
        beside: part of `link` that computing hides, s.
    """
    return compute + decide + max(0.0, link - beside)


def compute_seconds(nbytes: float, bandwidth: float, kernels: float = 0.0, kernel_seconds: float = 0.0) -> float:
    """Returns the time of kernels that read each weight once, a lower bound.

    Args:
        nbytes: bytes read.
        bandwidth: bytes per second at which the device reads its memory.
        kernels: kernels launched.
        kernel_seconds: time of a kernel beside its bytes, s.
    """
    return nbytes / bandwidth + kernels * kernel_seconds


def kernel_bandwidth(link: float) -> float:
    """Returns the bytes per second at which a kernel reads over a link of `link` bytes per second."""
    return min(link, KERNEL_LINK)
