"""Estimates the device memory of CUDA graphs before the model is loaded: pure arithmetic.

vLLM captures a few and extrapolates, but only once the model is loaded, and so after the slots were counted
(`determine_available_memory` in `vllm/v1/worker/gpu_worker.py`, `profile_cudagraph_memory` of both model runners). It
subtracts the result from the KV cache, within `gpu_memory_utilization`. So this is an upper estimate; where vLLM still
finds more, slots are given up for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PIECE_BYTES = 256 << 10
"""Memory of one graph of one piece of the model. An estimate: reported 6 to 8 MiB for each size of Llama 3.1 8B in 33
pieces, up to 272 tokens (github.com/vllm-project/vllm/pull/23184), which is 186 to 248 KiB a piece; beyond that size an
allocator block was added, see `BLOCK_BYTES`. A piece between attention and a MoE block has fewer kernels than those."""
WHOLE_LAYER_BYTES = 512 << 10
"""Memory of one layer in a graph of a whole step. An estimate: reported 0.21 GiB for 35 sizes of Llama 3.2 1B with 16
layers (github.com/vllm-project/vllm/pull/11349), which is 384 KiB, and 24 MiB a graph of a 27B model with 64 layers
(github.com/vllm-project/vllm/issues/50780), which is 375 KiB; a MoE block has more kernels than a dense one."""
MIN_GRAPH_BYTES = 1 << 20
"""Minimum memory per captured size: `_MIN_PER_GRAPH_BYTES` in vLLM's `cudagraph_utils.py`, "driver overhead per
graph"."""
BLOCK_BYTES = 20 << 20
"""Memory added for each size with large tensors, for allocations that find no free block in the shared pool: the block
that PyTorch's allocator takes for a tensor above `SMALL_BYTES` (`kLargeBuffer` in `c10/core/AllocatorConfig.h`)."""
SMALL_BYTES = 1 << 20
"""Largest tensor that PyTorch's allocator counts as small (`kSmallSize` in `c10/core/AllocatorConfig.h`)."""
WORKSPACE_BYTES = 32 << 20
"""cuBLAS workspace of the capturing stream: ":4096:8" on Hopper, more than on other GPUs (PyTorch's CUDA notes, "cuBLAS
workspaces")."""


@dataclass(frozen=True)
class CapturedGraphs:
    """CUDA graphs that a worker captures."""

    sizes: Sequence[int] = ()
    """Token counts of steps that are captured in pieces."""
    pieces: int = 0
    """Graphs per such step: the model is split at every attention, and at every MoE block that needs the host."""
    whole_sizes: Sequence[int] = ()
    """Token counts of steps that are captured whole."""
    layers: int = 0
    """Layers of the model, including those without experts."""

    def __str__(self) -> str:
        parts = []
        if self.sizes and self.pieces:
            parts.append(f"{len(self.sizes)} sizes in {self.pieces} pieces")
        if self.whole_sizes:
            parts.append(f"{len(self.whole_sizes)} whole")
        return ", ".join(parts)


def graph_bytes(graphs: CapturedGraphs, *, row_bytes: int, pair_bytes: int) -> int:
    """Estimates from above the memory of CUDA graphs and the pool they share; 0 if none are captured.

    All graphs share one pool and are captured from the largest size down, so tensors count once, for the largest size,
    plus one allocator block for each size with large tensors. The graphs' own memory counts for each.

    Args:
        graphs: the captured graphs.
        row_bytes: bytes of one token's hidden state.
        pair_bytes: bytes of all activations of a token, as in `activation_bytes`: only a graph of a whole step has
            those of experts, but eager steps have as much outside the pool.
    """
    sizes = [*graphs.sizes] if graphs.pieces else []
    sizes_of_all = [*sizes, *graphs.whole_sizes]
    if not sizes_of_all:
        return 0
    own = len(sizes) * max(MIN_GRAPH_BYTES, graphs.pieces * PIECE_BYTES)
    own += len(graphs.whole_sizes) * max(MIN_GRAPH_BYTES, graphs.layers * WHOLE_LAYER_BYTES)
    large = sum(size * row_bytes > SMALL_BYTES for size in sizes_of_all)
    return own + large * BLOCK_BYTES + max(sizes_of_all) * pair_bytes + WORKSPACE_BYTES


def bookkeeping_bytes(
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden: int,
    tokens: int,
    gates_ahead: int,
    heads: bool,
    first_head: bool,
    traced: bool = False,
) -> int:
    """Returns the device memory of the cache's own tables, computed from their shapes.

    These are the routing of a step that runs without the host (`DeferredRouting`), 32 bytes an expert for the residency
    on the device (`DeviceResidency` of one pool), for each layer the gates of the following layers with their bias
    (`GateStack`), and the trace of a step (`StepTrace`).

    Args:
        layers: number of MoE layers.
        experts: experts per layer.
        top_k: experts per token.
        hidden: hidden size.
        tokens: maximum tokens of a step that runs without the host; 0: no such steps, as on the CPU.
        gates_ahead: later layers for which each layer predicts; 0: no prediction.
        heads: each layer has a next-token head.
        first_head: a head predicts the first layer at the end of the previous step.
        traced: steps that run without the host are recorded in a trace.
    """
    routing = layers * tokens * (4 * top_k + 8)
    residency = layers * experts * 32 if tokens else 0
    gates = sum(min(gates_ahead, layers - 1 - layer) for layer in range(layers))
    stacks = 4 * (hidden + 1) * experts * (gates + layers * heads + first_head)
    trace = layers * tokens * (8 * top_k + 4 * experts * (min(gates_ahead, layers - 1) + heads)) if traced else 0
    return routing + residency + stacks + trace
