"""Computes how many slots fit into a budget: pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.units import GiB

RUNTIME_BYTES = 512 << 20
"""Memory left for what no formula covers: allocator fragmentation, compiled code, kernel workspaces."""
STREAM_ROWS = 8
"""Rows of the hidden size that a token occupies at once outside the experts: hidden state, residual, its norm, queries,
keys, values, and the outputs of attention and of the layer."""
LOGIT_BYTES = 4 + 4 + 8 + 4
"""Bytes per logit in the sampler: float32, sorted for top-p with its int64 index, and its probability."""


@dataclass(frozen=True)
class ExpertShape:
    """Layers whose experts have the same shape; they share a pool of slots."""

    num_experts: int
    """Routed experts of all these layers together."""
    bytes_per_expert: int
    top_k: int
    """Slots that one token needs in one layer: the minimum for a pool."""


@dataclass(frozen=True)
class DeviceMemory:
    """Breakdown of a worker's memory in bytes; the rest is for slots."""

    usable: int
    """Memory that vLLM may use, including what is already in use."""
    in_use: int = 0
    """Memory counted against `usable` before the weights are loaded."""
    other_weights: int = 0
    """Bytes of all weights other than routed experts."""
    activations: int = 0
    kv_cache: int = 0
    """Minimum KV cache with which vLLM starts."""
    kv_cache_of: str = ""
    """Description of what that KV cache holds, for messages."""
    remedy: str = "use a device with more memory"
    """Advice on how to leave more memory for slots, for messages."""
    graphs: int = 0
    """CUDA graphs, which vLLM captures after it has allocated the KV cache."""
    graphs_of: str = ""
    """Description of the captured graphs, for messages."""
    bookkeeping: int = 0
    """Memory of the cache's own gates, tables and buffers."""
    draft_model: int = 0
    """Bytes of the weights of the draft model of speculative decoding."""

    @property
    def left(self) -> int:
        """Memory left for slots; negative: the rest alone does not fit."""
        spent = self.in_use + self.other_weights + self.draft_model + self.activations + self.kv_cache
        return self.usable - spent - self.graphs - self.bookkeeping

    def __str__(self) -> str:
        parts = {
            "in use": self.in_use,
            "other weights": self.other_weights,
            "draft model": self.draft_model,
            "activations": self.activations,
            "KV cache" + (f" ({self.kv_cache_of})" if self.kv_cache_of else ""): self.kv_cache,
            "CUDA graphs" + (f" ({self.graphs_of}, estimated)" if self.graphs_of else ""): self.graphs,
            "gates and tables": self.bookkeeping,
        }
        spent = "".join(f" - {nbytes / GiB:.2f} {part}" for part, nbytes in parts.items() if nbytes)
        return f"{self.usable / GiB:.2f} usable{spent}"


def activation_bytes(
    *, tokens: int, logit_rows: int, hidden: int, vocabulary: int, inner: int, top_k: int, dtype_bytes: int
) -> int:
    """Estimates from above the peak memory of a step without weights and KV cache.

    Every token has `STREAM_ROWS` rows. Every pair of token and expert has its input, gate and up projections, their
    product and its output, and the output once more in float32, for the sum. Every sampled row has logits in the
    model's dtype, and `LOGIT_BYTES` for each. `RUNTIME_BYTES` are added.

    Args:
        tokens: maximum tokens per step (`max_num_batched_tokens`).
        logit_rows: maximum number of sampled rows.
        hidden: hidden size.
        vocabulary: logits per row.
        inner: intermediate size of an expert on this worker.
        top_k: experts per token.
        dtype_bytes: bytes per element of the model's dtype.
    """
    logits = logit_rows * vocabulary * (dtype_bytes + LOGIT_BYTES)
    return tokens * token_bytes(hidden, inner, top_k, dtype_bytes) + logits + RUNTIME_BYTES


def token_bytes(hidden: int, inner: int, top_k: int, dtype_bytes: int) -> int:
    """Returns the bytes that one token adds to `activation_bytes`, without logits."""
    stream = STREAM_ROWS * hidden * dtype_bytes
    return stream + top_k * ((2 * inner + inner + 2 * hidden) * dtype_bytes + 4 * hidden)


def check_budget(config: AdapMoEConfig, max_experts: int | None, top_k: int, memory: DeviceMemory) -> None:
    """Rejects a budget that cannot work for any model with at most `max_experts` experts, before the model is loaded.

    Args:
        config: the budget.
        max_experts: upper bound of routed experts over all layers; None: not known.
        top_k: slots that one token needs in one layer.
        memory: the memory as far as it is known.

    Raises:
        AdapMoEError: too few slots for one token, more slots than experts, or no memory for any slot.
    """
    slots, key = max_experts or top_k, ""
    if config.cache_experts is not None:
        slots, key = config.cache_experts, f"cache_experts={config.cache_experts}"
    elif config.cache_fraction is not None and max_experts is not None:
        slots, key = int(max_experts * config.cache_fraction + 1e-9), f"cache_fraction={config.cache_fraction}"
    if slots < top_k:
        raise AdapMoEError(
            f"{key} gives {slots} expert slots, but a token needs {top_k} at once; set at least cache_experts={top_k}"
        )
    if max_experts is not None and slots > max_experts:
        raise AdapMoEError(f"{key} is more than the {max_experts} routed experts that this model can have; set fewer")
    if memory.left <= 0:
        raise AdapMoEError(f"no memory for expert slots: {_missing(0, memory)}; {memory.remedy}")


def count_slots(config: AdapMoEConfig, shapes: Sequence[ExpertShape], memory: DeviceMemory) -> list[int]:
    """Returns the slots of each pool under the configured budget; with `auto`, what fits into the memory left.

    Pools share the budget in proportion to their experts' bytes.

    Raises:
        AdapMoEError: the budget gives fewer than top-k slots, more slots than experts, or does not fit.
    """
    experts = sum(shape.num_experts for shape in shapes)
    total_bytes = sum(shape.num_experts * shape.bytes_per_expert for shape in shapes)
    if config.cache_experts is not None:
        key, fraction = f"cache_experts={config.cache_experts}", config.cache_experts / experts
        if fraction > 1:
            raise AdapMoEError(f"{key} is more than the {experts} routed experts of this model; set at most {experts}")
    elif config.cache_fraction is not None:
        key, fraction = f"cache_fraction={config.cache_fraction}", config.cache_fraction
    elif config.cache_gb != "auto":
        key, fraction = f"cache_gb={config.cache_gb}", min(1.0, config.cache_gb * GiB / total_bytes)
    else:
        return _slots_in(shapes, total_bytes, memory)
    slots = [int(shape.num_experts * fraction + 1e-9) for shape in shapes]
    for shape, count in zip(shapes, slots, strict=True):
        if count < shape.top_k:
            needed = shape.top_k / shape.num_experts
            raise AdapMoEError(
                f"{key} gives {count} expert slots of {shape.bytes_per_expert / GiB:.3f} GiB, but a token needs "
                f"{shape.top_k} at once; set at least cache_gb={needed * total_bytes / GiB:.3f} "
                f"or cache_fraction={needed:.3f}"
            )
    slot_bytes = bytes_of(shapes, slots)
    if slot_bytes > memory.left:
        fits = memory.left >= _min_bytes(shapes, total_bytes)
        smaller = f"set at most cache_gb={memory.left * 1000 // GiB / 1000:.3f}, or " if fits else ""
        raise AdapMoEError(
            f"{key} takes {slot_bytes / GiB:.3f} GiB for {sum(slots)} expert slots, {_missing(slot_bytes, memory)}; "
            f"{smaller}{memory.remedy}"
        )
    return slots


def choose_slots(
    config: AdapMoEConfig, shapes: Sequence[ExpertShape], resident: DeviceMemory, offloaded: DeviceMemory
) -> tuple[list[int], DeviceMemory]:
    """Applies `count_slots` when the memory left depends on whether every expert is resident.

    A fully resident model has fewer graphs and no bookkeeping.

    Args:
        config: the budget.
        shapes: shapes of the experts.
        resident: memory if there is a slot for every expert.
        offloaded: memory otherwise.

    Returns:
        Slots of each pool, and the memory, `resident` or `offloaded`, that they were counted in.

    Raises:
        AdapMoEError: as `count_slots`.
    """
    everything = [shape.num_experts for shape in shapes]
    try:
        if count_slots(config, shapes, resident) == everything:
            return everything, resident
    except AdapMoEError:  # the error for the offloaded model, below, is the one to report
        pass
    slots = count_slots(config, shapes, offloaded)
    if slots == everything:  # then the model would be fully resident, which did not fit
        offloaded = replace(offloaded, graphs=max(offloaded.graphs, resident.graphs))
        slots = count_slots(config, shapes, offloaded)
    return slots, offloaded


def slots_without(shapes: Sequence[ExpertShape], slots: Sequence[int], nbytes: int) -> list[int] | None:
    """Returns the slots of each pool after giving back at least `nbytes`, in proportion.

    Returns None if a pool would have fewer slots than one token needs.
    """
    total = bytes_of(shapes, slots)
    remaining = [count * max(0, total - nbytes) // total for count in slots]
    return remaining if all(count >= shape.top_k for shape, count in zip(shapes, remaining, strict=True)) else None


def _slots_in(shapes: Sequence[ExpertShape], total_bytes: int, memory: DeviceMemory) -> list[int]:
    needed = _min_bytes(shapes, total_bytes)
    if memory.left < needed:
        raise AdapMoEError(
            f"cache_gb=auto needs {needed / GiB:.3f} GiB for the expert slots of one token, "
            f"{_missing(needed, memory)}; {memory.remedy}"
        )
    nbytes = min(memory.left, total_bytes)
    return [shape.num_experts * nbytes // total_bytes for shape in shapes]


def _min_bytes(shapes: Sequence[ExpertShape], total_bytes: int) -> int:
    """Returns the smallest budget in bytes that gives every pool top-k slots."""
    return max(-(-shape.top_k * total_bytes // shape.num_experts) for shape in shapes)


def _missing(nbytes: int, memory: DeviceMemory) -> str:
    missing = nbytes - memory.left
    return f"{missing} bytes ({missing / GiB:.3f} GiB) more than the {memory.left / GiB:.3f} GiB left: {memory}"


def split_layers(layers: Sequence[int], slots: int, piece_bytes: int, limit: int) -> list[list[int]]:
    """Splits the layers of a pool into several pools, so that no slot tensor reaches `limit` bytes.

    A kernel with 32-bit offsets cannot address a larger tensor. The pools share the slots in proportion to their layers
    and together hold as many experts as one pool would, but layers of different pools cannot use each other's slots.
    Layers are interleaved, so that each pool has early and late ones.

    Args:
        layers: indices of layers with equal numbers of experts.
        slots: slots of the whole pool.
        piece_bytes: bytes of the largest tensor of one expert.
        limit: bytes that no tensor may reach.
    """
    parts = 1
    while parts < len(layers):
        layers_per_pool = -(-len(layers) // parts)
        if slots * layers_per_pool * piece_bytes < limit * len(layers):
            break
        parts += 1
    return [list(layers[part::parts]) for part in range(parts)]


def bytes_of(shapes: Sequence[ExpertShape], slots: Sequence[int]) -> int:
    """Returns the memory of these numbers of slots in each pool."""
    return sum(count * shape.bytes_per_expert for shape, count in zip(shapes, slots, strict=True))
