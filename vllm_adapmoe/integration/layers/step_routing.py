"""What a layer's step chose, on the host, where it is decided what to fetch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    def without(self, failed: torch.Tensor) -> "StepRouting | None":
        """The same step, in which rows that have failed need what another row needs; None: no row is left.

        Args:
            failed: bool `[tokens]`, on the host.
        """
        others = ~failed if self.real is None else self.real & ~failed  # routers give padding the id -1
        if not others.any():
            return None
        healthy = int(others.nonzero()[0])
        return replace(self, ids=torch.where(failed.unsqueeze(1), self.ids[healthy], self.ids))


def read_together(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors of one device on the host, None where None was given: one copy, and one wait."""
    given = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.device.type == "cpu" for tensor in given):
        return list(tensors)
    host = iter(unpack(pack(given).cpu(), given))
    return [None if tensor is None else next(host) for tensor in tensors]


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of `tensors` in one, uint8: the widest dtype first, so that each starts where it can be read."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in sorted(tensors, key=_width)])


def unpack(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of `pack(like)`, in the order of `like`."""
    views: dict[int, torch.Tensor] = {}
    start = 0
    for tensor in sorted(like, key=_width):
        stop = start + tensor.numel() * tensor.element_size()
        views[id(tensor)] = flat[start:stop].view(tensor.dtype).view(tensor.shape)
        start = stop
    return [views[id(tensor)] for tensor in like]


def _width(tensor: torch.Tensor) -> int:
    return -tensor.element_size()
