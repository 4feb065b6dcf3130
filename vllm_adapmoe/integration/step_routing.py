"""What a layer's step chose, on the host, where it is decided what to fetch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepRouting:
    """Of one layer."""

    x: torch.Tensor
    """`[tokens, hidden]`, on the device."""
    weights: torch.Tensor
    """float32 `[tokens, top_k]`, on the device, after gating."""
    ids: torch.Tensor
    """Integer `[tokens, top_k]`, on the host, logical expert ids."""
    real: torch.Tensor | None
    """Bool `[tokens]`, on the host: False for padding; None: there is none."""
    keep: torch.Tensor | None
    """Bool `[tokens, top_k]`, on the host: what gating keeps of the real tokens; None: nothing is gated."""
    product: torch.Tensor | None = None
    """float32 `[tokens, columns]`, on the host: `GateStack.product` of the input; None: not made yet."""

    def all_kept(self) -> torch.Tensor:
        """`keep`, where nothing is gated."""
        keep = torch.ones(self.ids.shape, dtype=torch.bool)
        return keep if self.real is None else keep & self.real.unsqueeze(1)


def read_together(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors of one device on the host, None where None was given: one copy, and one wait."""
    given = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.device.type == "cpu" for tensor in given):
        return list(tensors)
    # The widest first, so that each starts where its dtype can be read.
    given.sort(key=lambda tensor: -tensor.element_size())
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in given]).cpu()
    host: dict[int, torch.Tensor] = {}
    start = 0
    for tensor in given:
        stop = start + tensor.numel() * tensor.element_size()
        host[id(tensor)] = flat[start:stop].view(tensor.dtype).view(tensor.shape)
        start = stop
    return [None if tensor is None else host[id(tensor)] for tensor in tensors]
