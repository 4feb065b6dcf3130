"""A layer's routing of one step, on the host, which decides what to fetch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(slots=True)
class StepRouting:
    """Routing of one step in one layer."""

    x: torch.Tensor
    """Input of the experts, `[tokens, hidden]`, on the device."""
    weights: torch.Tensor
    """Router weights after gating, float32 `[tokens, top_k]`, on the device."""
    ids: torch.Tensor
    """Logical expert ids, integer `[tokens, top_k]`, on the host."""
    real: torch.Tensor | None
    """Bool `[tokens]`, on the host: False for padding; None: no padding."""
    keep_mask: torch.Tensor | None
    """Bool `[tokens, top_k]`, on the host: experts that gating keeps, none for padding; None: no gating."""
    product: torch.Tensor | None = None
    """`GateStack.product` of the input, float32 `[tokens, columns]`, on the host; None: not computed yet."""

    def ungated_mask(self) -> torch.Tensor:
        """Returns the keep mask of a step without gating: everything but padding."""
        keep_mask = torch.ones(self.ids.shape, dtype=torch.bool)
        return keep_mask if self.real is None else keep_mask & self.real.unsqueeze(1)

    def replace_failed(self, failed: torch.Tensor) -> "StepRouting | None":
        """Returns the step with failed rows given a healthy row's experts; None if no healthy row remains.

        Args:
            failed: bool `[tokens]`, on the host.
        """
        healthy = ~failed if self.real is None else self.real & ~failed  # routers give padding the id -1
        if not healthy.any():
            return None
        donor = int(healthy.nonzero()[0])
        return replace(self, ids=torch.where(failed.unsqueeze(1), self.ids[donor], self.ids))


def read_together(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Copies tensors of one device to the host in one transfer with one wait; None stays None."""
    if all(tensor is None or tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    given = [tensor for tensor in tensors if tensor is not None]
    host = iter(unpack(pack(given).cpu(), given))
    return [None if tensor is None else next(host) for tensor in tensors]


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates the bytes of `tensors` as uint8, widest dtype first, so that each starts aligned."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in sorted(tensors, key=_width)])


def unpack(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors in `flat`, made by `pack(like)`, as views in the order of `like`."""
    views: dict[int, torch.Tensor] = {}
    start = 0
    for tensor in sorted(like, key=_width):
        stop = start + tensor.numel() * tensor.element_size()
        views[id(tensor)] = flat[start:stop].view(tensor.dtype).view(tensor.shape)
        start = stop
    return [views[id(tensor)] for tensor in like]


def _width(tensor: torch.Tensor) -> int:
    return -tensor.element_size()
