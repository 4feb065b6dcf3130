"""The later layers' gates, and a layer's own next-token head, as one matrix on the layer's input."""

import numpy as np
import torch
from torch.nn.functional import pad


def find_gate(model: torch.nn.Module, layer_name: str) -> torch.nn.Module | None:
    """The module that gives a layer's router logits: beside the experts, under the name that the model chose."""
    try:
        block = model.get_submodule(layer_name.rpartition(".")[0])
    except AttributeError:
        return None
    return getattr(block, "gate", None) or getattr(block, "router", None)


class GateStack:
    """Linear maps of one input, stacked: one product gives what all of them say.

    Args:
        gates: modules hidden -> router logits, of the layers after; None where a layer's was not found.
        head: float32 `[hidden + 1, experts]`, the last row constant; None: there is none.
        hidden: size of the experts' input. A kernel may have padded it with zeros beyond what gates and head take;
            a gate that takes more has another input than the experts (latent MoE), and says nothing.
        dtype: of their input.
        device: of their weights.
    """

    def __init__(
        self,
        gates: list[torch.nn.Module | None],
        head: np.ndarray | None,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        weights, biases = [], []
        self.slices: list[slice | None] = []
        """Columns of each gate's logits."""
        end = 0
        for gate in gates:
            width = 0 if gate is None else _input_size(gate, hidden)
            if gate is None or width > hidden:
                self.slices.append(None)
                continue
            # Whatever format its weights are in: a linear map is what it does to the unit vectors.
            bias = _logits(gate, torch.zeros(1, width, dtype=dtype, device=device))
            rows = _logits(gate, torch.eye(width, dtype=dtype, device=device)) - bias
            weights.append(_of_height(rows, hidden))
            biases.append(bias[0])
            self.slices.append(slice(end, end + len(bias[0])))
            end += len(bias[0])
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


def _input_size(gate: torch.nn.Module, default: int) -> int:
    size = getattr(gate, "input_size", None) or getattr(gate, "in_features", None)
    if isinstance(size, int):
        return size
    weight = getattr(gate, "weight", None)
    return weight.shape[-1] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else default


def _of_height(rows: torch.Tensor, height: int) -> torch.Tensor:
    """Rows for an input of `height`, whose further columns are zero; a head made for a wider one has rows too many."""
    return pad(rows[:height], (0, 0, 0, max(0, height - len(rows))))


def _logits(gate: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = gate(x)
    return (output[0] if isinstance(output, tuple) else output).float()
