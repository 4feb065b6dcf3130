"""Shapes of models' experts, and the statistics that routing is drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_check.published import PREFETCH_RECALL, SINGLE_EXPERT_RATIO
from vllm_adapmoe.store.record import RecordLayout

GATE_UP, DOWN = "w13_weight", "w2_weight"
"""vLLM's names of an expert's two weight tensors."""


@dataclass(frozen=True)
class Shape:
    """Shape of the MoE layers of a model."""

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    recall: Sequence[float] | None = None
    """Share of used experts that were predicted, for each layer; None: not published."""
    single: Sequence[float] | None = None
    """Share of tokens that gating leaves with one expert, for each layer; None: not published."""

    def layout(self, dtype: torch.dtype) -> RecordLayout:
        """Returns the layout of one expert's record."""
        pieces = {GATE_UP: (1, 2 * self.inner, self.hidden), DOWN: (1, self.hidden, self.inner)}
        return RecordLayout.of({name: torch.empty(size, dtype=dtype, device="meta") for name, size in pieces.items()})

    def with_layers(self, count: int) -> "Shape":
        """Returns the shape with fewer layers, evenly spread, and their statistics."""
        chosen = [round(index * (self.layers - 1) / max(1, count - 1)) for index in range(count)]
        recall, single = (
            None if values is None else [values[layer] for layer in chosen] for values in (self.recall, self.single)
        )
        return replace(self, layers=count, recall=recall, single=single)


MIXTRAL = Shape("Mixtral-8x7B", 32, 8, 2, 4096, 14336, PREFETCH_RECALL, SINGLE_EXPERT_RATIO)
QWEN3 = Shape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768)
