"""Stacks later layers' gates and a layer's own next-token head into one matrix applied to the layer's input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from vllm_adapmoe.integration.worker.gate_trial import LinearGate


class GateStack:
    """Several linear maps of one input, stacked so that one product computes all of them.

    Args:
        gates: gates of the later layers, None for a router that is not linear in the experts' input. Their input may be
            narrower or wider than this layer's: missing rows are zero, surplus ones are left out.
        head: next-token head, float32 `[hidden + 1, experts]`, the last row constant; or None.
        hidden: size of the experts' input. A kernel may have padded it with zeros beyond the head's input.
        device: device of the stack.
    """

    def __init__(
        self, gates: Sequence[LinearGate | None], head: np.ndarray | None, hidden: int, device: torch.device
    ) -> None:
        weights, biases = [], []
        self.slices: list[slice | None] = []
        """Columns of each gate's logits; None for a missing gate."""
        end = 0
        for gate in gates:
            if gate is None:
                self.slices.append(None)
                continue
            weights.append(_of_height(gate.weight, hidden))
            biases.append(gate.bias)
            self.slices.append(slice(end, end + len(gate.bias)))
            end += len(gate.bias)
        self.width = end
        """Number of columns of all gates; followed by the head's columns."""
        if head is not None:
            weights.append(_of_height(torch.from_numpy(head[:-1]).to(device), hidden))
            biases.append(torch.from_numpy(head[-1]).to(device))
        self.weight = torch.cat(weights, 1).contiguous() if weights else None
        self.bias = torch.cat(biases) if biases else None
        self.columns = 0 if self.bias is None else len(self.bias)
        """Number of columns of `product`."""

    def follow(self, other: "GateStack") -> bool:
        """Copies another stack's values into this one's tensors; returns False if shapes differ, and copies nothing."""
        if self.slices != other.slices or self.width != other.width:
            return False
        pairs = [(self.weight, other.weight), (self.bias, other.bias)]
        tensors = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if any(mine.shape != theirs.shape for mine, theirs in tensors) or len(tensors) % 2:
            return False
        for mine, theirs in tensors:
            mine.copy_(theirs)
        return True

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns float32 `[tokens, columns]`, on the device, for `x` `[tokens, hidden]`."""
        assert self.weight is not None and self.bias is not None
        return torch.addmm(self.bias, x.float(), self.weight)

    def outputs(self, x: torch.Tensor) -> np.ndarray:
        """Returns `product` on the host."""
        return self.product(x).cpu().numpy()


def _of_height(rows: torch.Tensor, height: int) -> torch.Tensor:
    """Pads rows with zeros, or cuts them, to `height`, the size of the input."""
    return pad(rows[:height], (0, 0, 0, max(0, height - len(rows))))
