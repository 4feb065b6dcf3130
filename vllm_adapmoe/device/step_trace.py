"""StepTrace: what a trace needs of a step that the GPU decides, kept on the device until the step has run."""

import numpy as np
import torch

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.device.deferred import NOT_RECORDED, RoutingNotRecorded


class StepTrace:
    """Device buffers that every layer writes its routing, and the product that it predicts from, into.

    The buffers keep their addresses, so that a CUDA graph can write to them. They take `layers * tokens * (8 * top_k +
    4 * columns)` bytes: 8 MiB for 64 tokens of 48 layers with 128 experts, top-8, four gates and a head.

    Args:
        layers: number of MoE layers.
        tokens: maximum tokens of a step.
        top_k: experts per token, the maximum where layers differ.
        columns: maximum columns of a layer's product.
        device: device of the routing.
    """

    def __init__(self, layers: int, tokens: int, top_k: int, columns: int, device: torch.device) -> None:
        self.ids = torch.zeros((layers, tokens, top_k), dtype=torch.int32, device=device)
        """Experts that the router chose, those that gating drops included."""
        self.weights = torch.zeros((layers, tokens, top_k), device=device)
        """Weights after gating, float32."""
        self.products = torch.zeros((layers, tokens, columns), device=device)
        """`GateStack.product` of each layer's input, float32."""

    def begin_step(self) -> None:
        """Marks every layer as not recorded."""
        self.ids[:, :, 0].fill_(NOT_RECORDED)

    def record(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Records the routing of a layer, in a step of at most `tokens` tokens, padding included.

        Args:
            layer: MoE layer index.
            ids: experts that the router chose, integer `[tokens, top_k]`.
            weights: after gating, `[tokens, top_k]`.
        """
        tokens, top_k = ids.shape
        self.ids[layer, :tokens, :top_k].copy_(ids)
        self.weights[layer, :tokens, :top_k].copy_(weights)

    def record_product(self, layer: int, product: torch.Tensor) -> None:
        """Records `GateStack.product` of a layer, float32 `[tokens, columns]`."""
        self.products[layer, : product.shape[0], : product.shape[1]].copy_(product)

    def copy(self, tokens: int) -> HostCopy:
        """Starts copying a step that has been launched to the host; `tokens`: its tokens, which padding follows."""
        return HostCopy(self.ids[:, :tokens], self.weights[:, :tokens], self.products[:, :tokens])


def read_copy(copy: HostCopy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, weights and products of a `StepTrace.copy` that has arrived.

    Raises:
        RoutingNotRecorded: a layer has not recorded the step.
    """
    ids, weights, products = (tensor.numpy() for tensor in copy.tensors)
    missing_layers = np.flatnonzero((ids[:, :, 0] == NOT_RECORDED).any(1)).tolist()
    if missing_layers:
        raise RoutingNotRecorded(f"the CUDA graph of a decode step does not trace MoE layers {missing_layers}")
    return ids, weights, products
