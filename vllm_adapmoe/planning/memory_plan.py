"""What a memory budget buys: slots, then expected loads of a token, then tokens per second. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from vllm_adapmoe.config import AdapMoEError, PrefetchConfig
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.planning.graph_memory import CapturedGraphs, bookkeeping_bytes, graph_bytes
from vllm_adapmoe.planning.slot_budget import activation_bytes, token_bytes
from vllm_adapmoe.policy.allocation import expected_loads, share_out
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB

UTILIZATION = 0.92
"""Of a GPU, what vLLM takes by default (`gpu_memory_utilization`, `vllm/config/cache.py` of 0.32)."""
STEP_TOKENS, REQUESTS = 2048, 256
"""Of a step at most, by default: `vllm serve` below 70 GiB (`get_batch_defaults` in `vllm/engine/arg_utils.py`)."""
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Tokens of the steps that are captured by default (`_set_cudagraph_sizes` in `vllm/config/vllm.py`)."""
CONTEXT_BYTES = 512 << 20
"""In use before weights are loaded: CUDA's context and modules. An estimate, from 0.3 to 0.5 GiB on GPUs up to now."""


@dataclass(frozen=True)
class ModelSize:
    """A model in numbers. All experts have one size."""

    num_layers: int
    """With experts."""
    num_experts: int
    """Of such a layer."""
    top_k: int
    expert_bytes: int
    """Of one expert's record."""
    other_bytes: int
    """Weights that are no routed experts."""
    read_bytes: int
    """Of those, what a token has to read: all but the table of input embeddings."""
    all_layers: int
    """Layers, those without experts too."""

    @property
    def experts(self) -> int:
        """Routed experts of all layers."""
        return self.num_layers * self.num_experts


@dataclass(frozen=True)
class StepSize:
    """What a step of a model computes with, in numbers."""

    hidden: int
    inner: int
    """Intermediate size of an expert."""
    vocabulary: int
    dtype_bytes: int
    kv_bytes: int
    """Of the KV cache of one token, all layers together."""
    length: int
    """Tokens of a request at most."""


@dataclass(frozen=True)
class Reserve:
    """Memory that is neither weights nor slots: `nbytes`, and `share` of it all."""

    nbytes: int = 0
    share: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)
    """What `nbytes` are, by name."""

    @classmethod
    def of_gpu(cls, model: ModelSize, step: StepSize) -> Self:
        """What a GPU has to leave with vLLM's defaults, by the arithmetic that a worker chooses its slots with."""
        row, pair = (
            step.hidden * step.dtype_bytes,
            token_bytes(step.hidden, step.inner, model.top_k, step.dtype_bytes),
        )
        pieces = model.all_layers + model.num_layers + 1  # split at every attention and at every MoE block
        parts = {
            "CUDA itself": CONTEXT_BYTES,
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
        """What makes it smaller, for a message."""
        return "lower --max-model-len, or " if self.parts else ""

    def said(self) -> str:
        """Its parts, for a message."""
        parts = ", ".join(f"{nbytes / GiB:.2f} GiB {name}" for name, nbytes in self.parts.items())
        return f" ({self.share:.0%} of it, {parts})" if parts else ""

    def slots(self, model: ModelSize, memory: int) -> int:
        """Expert slots that fit into `memory` bytes in all; below zero: not even the other weights fit."""
        reserved = memory * self.share + self.nbytes
        return min(model.experts, int((memory - reserved - model.other_bytes) // model.expert_bytes))

    def memory(self, model: ModelSize, slots: int) -> int:
        """Least memory in all, bytes, that `slots` fit into."""
        taken = model.other_bytes + slots * model.expert_bytes + self.nbytes
        # One byte more than the quotient: `slots` rounds down.
        return int(taken / (1 - self.share)) + 1 if self.share else taken


@dataclass(frozen=True)
class Speed:
    """What times are made of: experts arrive over a link, one after the other, while nothing is computed."""

    link: float
    """Bytes per second."""
    layer_seconds: float | None = None
    """Of computing one layer for one token; None: as long as reading the weights it needs takes."""
    weights: float = 0.0
    """Bytes per second that weights are read with, where `layer_seconds` is None."""

    def compute_seconds(self, model: ModelSize, kept: float) -> float:
        """Of one token whose layers keep `kept` experts in all, fetches apart."""
        if self.layer_seconds is not None:
            return model.all_layers * self.layer_seconds
        return (model.read_bytes + kept * model.expert_bytes) / self.weights


@dataclass(frozen=True)
class Estimate:
    """Of one token, with one number of slots."""

    hits: float
    """Experts that are there when a layer asks for them, all layers together."""
    loads: float
    """Experts that a layer waits for."""
    fetched_bytes: float
    tokens_per_second: float
    shares: list[int] | None = None
    """Slots of each layer, where the estimate gave each its own."""


def closed_form(
    model: ModelSize, curves: Sequence[np.ndarray], slots: int, speed: Speed, allocation: str = "profile"
) -> Estimate:
    """A token's expected loads when each layer keeps its share of the slots, without prefetch.

    `sum over layers of k_l (1 - s_l / N)` (`cache.allocation.expected_loads`): every expert as likely as another, and
    whatever the token before used. What one token needs in a layer streams through slots of its own, as in the cache,
    unless everything fits.

    Args:
        model: its size.
        curves: of each layer, expected loads with 0, 1, .. slots.
        slots: in all, at least top_k.
        speed: of link and compute.
        allocation: `uniform`: as equal as can be; anything else: shares with the least loads.
    """
    kept = float(sum(curve[0] for curve in curves))
    if slots >= model.experts:
        shares = [model.num_experts] * model.num_layers
    else:
        shares = share_out(
            None if allocation == "uniform" else curves, [model.num_experts] * model.num_layers, slots - model.top_k
        )
    loads = float(sum(curve[share] for curve, share in zip(curves, shares, strict=True)))
    moved = loads * model.expert_bytes
    seconds = speed.compute_seconds(model, kept) + moved / speed.link
    return Estimate(kept - loads, loads, moved, 1 / seconds, shares)


def curves_of(model: ModelSize, profile: ModelProfile | None, threshold: float = 0.0) -> list[np.ndarray]:
    """Expected loads of each layer by slots; without statistics of routing, of top_k experts, each as likely.

    Args:
        model: its size.
        profile: of the model; None, or with constants only: popularity uniform.
        threshold: of gating, which needs statistics; 0: none.
    """
    if has_statistics(profile):
        assert profile is not None
        return curves_of_profile(profile, threshold, 0)
    return [expected_loads(model.num_experts, model.top_k)] * model.num_layers


def has_statistics(profile: ModelProfile | None) -> bool:
    """Whether a profile says how its model routes, and not only what its layers mind."""
    return profile is not None and all(
        layer.dropped is not None and layer.popularity is not None for layer in profile.layers
    )


def slots_for(model: ModelSize, memory: int, reserve: Reserve) -> int:
    """Slots that a memory budget leaves.

    Raises:
        AdapMoEError: fewer than one token needs in one layer; says how much memory would do.
    """
    slots = reserve.slots(model, memory)
    if slots < model.top_k:
        left = max(0, slots)
        raise AdapMoEError(
            f"--memory={memory / GiB:.2f}GiB leaves {left} expert slots of {model.expert_bytes / GiB:.4f} GiB beside "
            f"{model.other_bytes / GiB:.2f} GiB of other weights and the reserve{reserve.said()}, but a token needs "
            f"{model.top_k} at once; {reserve.remedy}set at least --memory "
            f"{_round_up(reserve.memory(model, model.top_k))}"
        )
    return slots


def _round_up(nbytes: int) -> str:
    hundredths = -(-nbytes * 100 // GiB)
    return f"{hundredths / 100:.2f}GiB"


def budgets(model: ModelSize, asked: int | None, steps: int = 10) -> list[int]:
    """Slots to look at: 1/steps, 2/steps .. of all experts, and those asked for; as far as one token fits."""
    chosen = {round(model.experts * step / steps) for step in range(1, steps + 1)}
    if asked is not None:
        chosen.add(asked)
    return sorted(slots for slots in chosen if slots >= model.top_k)
