"""The later layers' gates, and a layer's own next-token head, as one matrix on the layer's input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from vllm_adapmoe.integration.worker.gate_trial import LinearGate


class GateStack:
    """Linear maps of one input, stacked: one product gives what all of them say.

    Args:
        gates: of the layers after; None where a layer's router is no linear map of the experts' input. Their
            input may be narrower, or wider, than this layer's: what is missing is zero, what is beyond is left out.
        head: float32 `[hidden + 1, experts]`, the last row constant; None: there is none.
        hidden: size of the experts' input. A kernel may have padded it with zeros beyond what the head takes.
        device: of the stack.
    """

    def __init__(
        self, gates: Sequence[LinearGate | None], head: np.ndarray | None, hidden: int, device: torch.device
    ) -> None:
        weights, biases = [], []
        self.slices: list[slice | None] = []
        """Columns of each gate's logits."""
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
        """Columns of all gates together; the head's come after them."""
        if head is not None:
            weights.append(_of_height(torch.from_numpy(head[:-1]).to(device), hidden))
            biases.append(torch.from_numpy(head[-1]).to(device))
        self.weight = torch.cat(weights, 1).contiguous() if weights else None
        self.bias = torch.cat(biases) if biases else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[tokens, width + the head's experts]`, on the device, for `x` `[tokens, hidden]`."""
        assert self.weight is not None and self.bias is not None
        return torch.addmm(self.bias, x.float(), self.weight)

    def outputs(self, x: torch.Tensor) -> np.ndarray:
        """`product`, on the host."""
        return self.product(x).cpu().numpy()


def _of_height(rows: torch.Tensor, height: int) -> torch.Tensor:
    """Rows for an input of `height`, whose further columns are zero; a head made for a wider one has rows too many."""
    return pad(rows[:height], (0, 0, 0, max(0, height - len(rows))))
