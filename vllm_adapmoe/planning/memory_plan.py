"""Computes what a memory budget buys: slots, expected loads per token, tokens per second. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from vllm_adapmoe.config import AdapMoEError, PrefetchConfig
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.planning.graph_memory import CapturedGraphs, bookkeeping_bytes, graph_bytes
from vllm_adapmoe.planning.slot_budget import activation_bytes, token_bytes
from vllm_adapmoe.planning.token_time import (
    DECIDING_KERNELS,
    HOST_LAYER_SECONDS,
    KERNEL_SECONDS,
    LAYER_KERNELS,
    compute_seconds,
    kernel_bandwidth,
    token_seconds,
)
from vllm_adapmoe.policy.allocation import allocate_floors, expected_loads
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB

UTILIZATION = 0.92
"""Share of a GPU's memory that vLLM uses by default (`gpu_memory_utilization`, `vllm/config/cache.py` of 0.32)."""
STEP_TOKENS, REQUESTS = 2048, 256
"""Default maximum tokens and requests per step: `vllm serve` on GPUs below 70 GiB (`get_batch_defaults` in
`vllm/engine/arg_utils.py`)."""
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Token counts of steps that are captured by default (`_set_cudagraph_sizes` in `vllm/config/vllm.py`)."""
CONTEXT_BYTES = 512 << 20
"""Memory in use before weights are loaded: CUDA context and modules. An estimate: 0.3 to 0.5 GiB on GPUs so far."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model whose experts all have one size."""

    num_layers: int
    """Layers with routed experts."""
    num_experts: int
    """Routed experts per such layer."""
    top_k: int
    expert_bytes: int
    """Bytes of one expert's record."""
    other_bytes: int
    """Bytes of all weights other than routed experts."""
    read_bytes: int
    """Bytes of `other_bytes` that each token reads: all but the input embedding table, unless the output shares it."""
    all_layers: int
    """All layers, including those without experts."""

    @property
    def experts(self) -> int:
        """Routed experts of all layers."""
        return self.num_layers * self.num_experts


@dataclass(frozen=True)
class StepSize:
    """Sizes that the memory of a step depends on."""

    hidden: int
    inner: int
    """Intermediate size of an expert."""
    vocabulary: int
    dtype_bytes: int
    kv_bytes: int
    """KV-cache bytes per token, all layers together."""
    length: int
    """Maximum tokens per request."""


@dataclass(frozen=True)
class Reserve:
    """Memory for neither weights nor slots: `nbytes`, plus the fraction `share` of all memory."""

    nbytes: int = 0
    share: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)
    """Parts of `nbytes` by name."""

    @classmethod
    def of_gpu(cls, model: ModelSize, step: StepSize) -> Self:
        """Returns the reserve of a GPU with vLLM's defaults, by the same arithmetic by which a worker counts slots."""
        row, pair = (
            step.hidden * step.dtype_bytes,
            token_bytes(step.hidden, step.inner, model.top_k, step.dtype_bytes),
        )
        pieces = model.all_layers + model.num_layers + 1  # split at every attention and at every MoE block
        parts = {
            "CUDA context": CONTEXT_BYTES,
            "activations": activation_bytes(
                tokens=STEP_TOKENS,
                logit_rows=REQUESTS,
                hidden=step.hidden,
                vocabulary=step.vocabulary,
                inner=step.inner,
                top_k=model.top_k,
                dtype_bytes=step.dtype_bytes,
            ),
            f"KV cache of {step.length} tokens": step.kv_bytes * step.length,
            "CUDA graphs": graph_bytes(CapturedGraphs(CAPTURE_SIZES, pieces), row_bytes=row, pair_bytes=pair),
            "gates and tables": bookkeeping_bytes(
                layers=model.num_layers,
                experts=model.num_experts,
                top_k=model.top_k,
                hidden=step.hidden,
                tokens=MAX_TOKENS,
                gates_ahead=PrefetchConfig.model_fields["lookahead"].default,
                heads=False,
                first_head=False,
            ),
        }
        return cls(sum(parts.values()), 1 - UTILIZATION, parts)

    @property
    def remedy(self) -> str:
        """Advice on how to reduce the reserve, for error messages."""
        return "lower --max-model-len, or " if self.parts else ""

    def describe(self) -> str:
        """Describes the parts of the reserve, for error messages."""
        parts = ", ".join(f"{nbytes / GiB:.2f} GiB {name}" for name, nbytes in self.parts.items())
        return f" ({self.share:.0%} of --memory, {parts})" if parts else ""

    def slots(self, model: ModelSize, memory: int) -> int:
        """Returns the expert slots that fit into `memory` bytes in total; negative: the other weights do not fit."""
        reserved = memory * self.share + self.nbytes
        return min(model.experts, int((memory - reserved - model.other_bytes) // model.expert_bytes))

    def memory(self, model: ModelSize, slots: int) -> int:
        """Returns the minimum total memory in bytes that `slots` fit into."""
        needed = model.other_bytes + slots * model.expert_bytes + self.nbytes
        # One byte more than the quotient: `slots` rounds down.
        return int(needed / (1 - self.share)) + 1 if self.share else needed


@dataclass(frozen=True)
class Speed:
    """Speeds for the time model: experts are fetched one after another, and fetches do not overlap computation."""

    link: float
    """Link bandwidth, bytes per second."""
    layer_seconds: float | None = None
    """Compute time of one layer for one token; None: the time to read the weights it needs."""
    weights: float = 0.0
    """Bandwidth of reading weights, bytes per second; used if `layer_seconds` is None."""
    host_experts: int | None = None
    """Experts that host memory holds (`host_gb`), the others are on disk; None: it holds all."""
    disk: float | None = None
    """Bandwidth of reading from disk, bytes per second; None: that of the link."""
    decide_seconds: float = 0.0
    """Time that each MoE layer waits for decisions and launches, unless every expert is resident."""
    kernel_seconds: float = 0.0
    """Time of a kernel beside its bytes; used if `layer_seconds` is None."""

    def decided_on_device(self) -> Self:
        """Returns the speed of a GPU that decides its decode steps and fetches by a kernel, all in one graph."""
        return replace(
            self,
            link=kernel_bandwidth(self.link),
            decide_seconds=DECIDING_KERNELS * KERNEL_SECONDS,
            kernel_seconds=KERNEL_SECONDS,
        )

    def decided_on_host(self) -> Self:
        """Returns the speed of a GPU whose host decides every MoE layer and launches the copies."""
        return replace(self, decide_seconds=HOST_LAYER_SECONDS, kernel_seconds=KERNEL_SECONDS)

    def fetch_seconds(self, nbytes: float, absent: int) -> float:
        """Returns the time to fetch `nbytes` of experts, any of the `absent` ones as likely as another.

        Host memory keeps those that are fetched most often, so none of its experts is in a slot for long.
        """
        found = 1.0 if self.host_experts is None else min(1.0, self.host_experts / max(absent, 1))
        return nbytes * (found / self.link + (1 - found) / min(self.link, self.disk or self.link))

    def compute_seconds(self, model: ModelSize, kept: float) -> float:
        """Returns the compute time of one token that uses `kept` experts over all layers, without fetches."""
        if self.layer_seconds is not None:
            return model.all_layers * self.layer_seconds
        return compute_seconds(
            model.read_bytes + kept * model.expert_bytes,
            self.weights,
            model.all_layers * LAYER_KERNELS,
            self.kernel_seconds,
        )


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one token with a given number of slots."""

    hits: float
    """Experts per token that are resident when their layer needs them, all layers together."""
    loads: float
    """Demand loads per token, all layers together."""
    fetched_bytes: float
    tokens_per_second: float
    shares: list[int] | None = None
    """Slots of each layer, if the estimate assigns slots to layers."""


def closed_form(
    model: ModelSize, curves: Sequence[np.ndarray], slots: int, speed: Speed, allocation: str = "profile"
) -> Estimate:
    """Estimates a token's expected loads if each layer has its own fixed share of the slots, without prefetch.

    The loads are `sum over layers of k_l (1 - s_l / N)` (`policy.allocation.expected_loads`): all experts are equally
    likely, independent of the previous token. As in the cache, top_k of the slots are set aside for the experts that
    one token needs in the current layer, unless every expert fits.

    Args:
        model: sizes of the model.
        curves: expected loads of each layer with 0, 1, .. slots.
        slots: total slots, at least top_k.
        speed: speed of link and compute.
        allocation: `uniform`: shares as equal as possible; anything else: shares with the least loads.
    """
    kept = float(sum(curve[0] for curve in curves))
    if slots >= model.experts:
        shares = [model.num_experts] * model.num_layers
    else:
        shares = allocate_floors(
            None if allocation == "uniform" else curves, [model.num_experts] * model.num_layers, slots - model.top_k
        )
    loads = float(sum(curve[share] for curve, share in zip(curves, shares, strict=True)))
    moved = loads * model.expert_bytes
    seconds = token_seconds(
        speed.compute_seconds(model, kept),
        speed.fetch_seconds(moved, model.experts - slots),
        model.num_layers * speed.decide_seconds if slots < model.experts else 0.0,
    )
    return Estimate(kept - loads, loads, moved, 1 / seconds, shares)


def curves_of(model: ModelSize, profile: ModelProfile | None, threshold: float = 0.0) -> list[np.ndarray]:
    """Returns the expected loads of each layer by slots.

    Args:
        model: sizes of the model.
        profile: profile of the model; None or without routing statistics: top_k experts per token, all equally likely.
        threshold: gating threshold, which needs routing statistics; 0: no gating.
    """
    if has_statistics(profile):
        assert profile is not None
        return curves_of_profile(profile, threshold, 0)
    return [expected_loads(model.num_experts, model.top_k)] * model.num_layers


def has_statistics(profile: ModelProfile | None) -> bool:
    """Returns whether a profile has routing statistics, not only sensitivities."""
    return profile is not None and all(
        layer.dropped is not None and layer.popularity is not None for layer in profile.layers
    )


def slots_for(model: ModelSize, memory: int, reserve: Reserve) -> int:
    """Returns the slots that fit into a memory budget.

    Raises:
        AdapMoEError: fewer slots than one token needs in one layer; the message says how much memory is enough.
    """
    slots = reserve.slots(model, memory)
    if slots < model.top_k:
        fitting = max(0, slots)
        raise AdapMoEError(
            f"--memory={memory / GiB:.2f}GiB leaves {fitting} expert slots of {model.expert_bytes / GiB:.4f} GiB "
            f"beside {model.other_bytes / GiB:.2f} GiB of other weights and the reserve{reserve.describe()}, but a "
            f"token needs {model.top_k} at once; {reserve.remedy}set at least --memory "
            f"{_round_up(reserve.memory(model, model.top_k))}"
        )
    return slots


def _round_up(nbytes: int) -> str:
    hundredths = -(-nbytes * 100 // GiB)
    return f"{hundredths / 100:.2f}GiB"


def budgets(model: ModelSize, requested: int | None, steps: int = 10) -> list[int]:
    """Returns the slot counts to estimate: 1/steps, 2/steps .. of all experts, and `asked`; at least top_k."""
    chosen = {round(model.experts * step / steps) for step in range(1, steps + 1)}
    if requested is not None:
        chosen.add(requested)
    return sorted(slots for slots in chosen if slots >= model.top_k)
