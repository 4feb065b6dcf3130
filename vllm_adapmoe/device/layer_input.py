"""What a layer computes on the device, for the GPU to decide from: choices of router and gate, and predictions."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chosen:
    """Experts that a layer's router and gate have chosen in one step."""

    ids: torch.Tensor
    """The router's choice, int32 or int64 `[tokens, top_k]`; -1: none."""
    keep_mask: torch.Tensor | None = None
    """Bool `[tokens, top_k]`: what gating keeps; None: no gating."""
    cost: torch.Tensor | None = None
    """Cost of what gating dropped, as in `Gated.cost`, float64 `[tokens]`; None: no gating."""


@dataclass(frozen=True)
class Predicted:
    """What is predicted from a layer's input."""

    outputs: torch.Tensor | None = None
    """Float32 `[tokens, columns]`; the columns from `head` on are chances that each token's next step uses each expert
    of the layer. None: not predicted."""
    head: int = 0
    """First column of the next-token head; as many as there are: none."""
    ahead: torch.Tensor | None = None
    """Experts that each token is predicted to use in the next layer, int32 or int64 `[tokens, any]`; None: no
    prediction."""
