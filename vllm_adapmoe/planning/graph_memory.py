"""What CUDA graphs will take of a device, estimated before there is a model to capture: pure arithmetic.

vLLM captures a few and extrapolates, but only once the model is loaded, and so after the slots were counted
(`determine_available_memory` in `vllm/v1/worker/gpu_worker.py`, `profile_cudagraph_memory` of both model runners). What
it finds is subtracted from the KV cache, within `gpu_memory_utilization`. So this is an estimate from above; where vLLM
still finds more, slots give way to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PIECE_BYTES = 256 << 10
"""Of one graph of a piece of the model. An estimate: reported 6 to 8 MiB for each size of Llama 3.1 8B in 33 pieces,
up to 272 tokens (github.com/vllm-project/vllm/pull/23184), which is 186 to 248 KiB a piece; beyond that size a block of
the allocator was added, see `BLOCK_BYTES`. A piece between attention and a MoE block has fewer kernels than those."""
WHOLE_LAYER_BYTES = 512 << 10
"""Of one layer in a graph of a whole step. An estimate: reported 0.21 GiB for 35 sizes of Llama 3.2 1B with 16 layers
(github.com/vllm-project/vllm/pull/11349), which is 384 KiB, and 24 MiB a graph of a 27B model with 64 layers
(github.com/vllm-project/vllm/issues/50780), which is 375 KiB; a MoE block has more kernels than a dense one."""
LEAST_GRAPH_BYTES = 1 << 20
"""Of a size at least: `_MIN_PER_GRAPH_BYTES` in vLLM's `cudagraph_utils.py`, "driver overhead per graph"."""
BLOCK_BYTES = 20 << 20
"""Of one size whose tensors are large, for what its graphs do not find free in the pool that all share: the block that
PyTorch's allocator takes for a tensor above `SMALL_BYTES` (`kLargeBuffer` in `c10/core/AllocatorConfig.h`)."""
SMALL_BYTES = 1 << 20
"""`kSmallSize` there."""
WORKSPACE_BYTES = 32 << 20
"""Of cuBLAS on the stream that captures: ":4096:8" on Hopper, which is more than elsewhere (PyTorch's CUDA notes,
"cuBLAS workspaces")."""


@dataclass(frozen=True)
class CapturedGraphs:
    """Which graphs a worker captures."""

    sizes: Sequence[int] = ()
    """Tokens of the steps whose pieces are captured."""
    pieces: int = 0
    """Graphs of such a step: the model is split at every attention, and at a MoE block that asks the host."""
    whole_sizes: Sequence[int] = ()
    """Tokens of the steps that are captured whole."""
    layers: int = 0
    """Of the model, those without experts too."""

    def __str__(self) -> str:
        said = []
        if self.sizes and self.pieces:
            said.append(f"{len(self.sizes)} sizes in {self.pieces} pieces")
        if self.whole_sizes:
            said.append(f"{len(self.whole_sizes)} whole")
        return ", ".join(said)


def graph_bytes(graphs: CapturedGraphs, *, row_bytes: int, pair_bytes: int) -> int:
    """Memory of CUDA graphs and of the pool they share, estimated from above; 0 where none are captured.

    All graphs share one pool, captured from the largest size down, so tensors count for the largest, and a block of the
    allocator for every other size that has large ones. What graphs themselves take counts for each.

    Args:
        graphs: what is captured.
        row_bytes: of one token's hidden state.
        pair_bytes: of all activations of a token, as in `activation_bytes`: only a graph of a whole step has those of
            experts, but eager steps have as much outside the pool.
    """
    sizes = [*graphs.sizes] if graphs.pieces else []
    sizes_of_all = [*sizes, *graphs.whole_sizes]
    if not sizes_of_all:
        return 0
    own = len(sizes) * max(LEAST_GRAPH_BYTES, graphs.pieces * PIECE_BYTES)
    own += len(graphs.whole_sizes) * max(LEAST_GRAPH_BYTES, graphs.layers * WHOLE_LAYER_BYTES)
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
) -> int:
    """Memory of what the cache itself keeps on a device, by the shapes of it.

    The routing of a step without the host (`DeferredRouting`), the addresses of two pieces of every expert
    (`AddressTable`), and, for each layer, the gates of the layers after it with their constant (`GateStack`).

    Args:
        layers: with experts.
        experts: of such a layer.
        top_k: experts of a token.
        hidden: hidden size.
        tokens: of a step without the host at most; 0: there are none, as on the CPU.
        gates_ahead: later layers that each layer looks at; 0: none does.
        heads: each layer has a next-token head.
        first_head: there is one for the end of the step before.
    """
    routing = layers * tokens * (4 * top_k + 8)
    addresses = 2 * layers * experts * 8 if tokens else 0
    gates = sum(min(gates_ahead, layers - 1 - layer) for layer in range(layers))
    stacks = 4 * (hidden + 1) * experts * (gates + layers * heads + first_head)
    return routing + addresses + stacks
