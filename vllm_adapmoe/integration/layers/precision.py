"""Quantises the experts of a bf16 checkpoint while they load, into the formats of vLLM's kernels for int8 and int4."""

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.precision.formats import GROUPS, group_of, int4_bytes, int8_bytes
from vllm_adapmoe.precision.rounding import pack_int4, round_to_int4, round_to_int8
from vllm_adapmoe.printable import reason

ROUNDING = 1
"""Version of the rounding, part of a pack's identity: increase it with every change of a record's bytes."""
WEIGHTS = ("w13", "w2")

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


class QuantisingMethod:
    """Mixin over a quantisation method of vLLM: loads the weights of an unquantised checkpoint, and quantises them.

    vLLM's own methods that quantise while loading are not used: they load through its layerwise reloading, which wants
    a quantisation configuration for the whole model, and none of them makes int4.
    """

    bits: int
    relative_error: float | None = None
    """Root of the squared error over the squared weights; None until weights have been quantised."""

    def quantise(self, name: str, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """Quantises one weight of one expert, `[rows, columns]`.

        Returns:
            Its parameters as vLLM's method loads them, by name, and the squared error.
        """
        raise NotImplementedError

    def bytes_of(self, weight: torch.Tensor) -> int:
        """Returns the bytes of one expert's part of a weight `[experts, rows, columns]` in its record."""
        raise NotImplementedError

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Creates the parameters of the unquantised weights."""
        create: Any = UnquantizedFusedMoEMethod.create_weights  # uses nothing of its class
        create(self, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantises the loaded weights, and converts them to the kernel's format; again after weights are replaced.

        Raises:
            AdapMoEError: a weight is not finite, and would spoil all that share its scale.
        """
        error = squares = 0.0
        for name in WEIGHTS:
            experts = getattr(layer, f"{name}_weight").data
            parameters: dict[str, torch.Tensor] = {}
            for expert, weights in enumerate(experts):
                size = float(weights.float().square().sum())
                if not size < float("inf"):
                    raise AdapMoEError(
                        f"precision={self.bits}: expert {expert} of {getattr(layer, 'layer_name', 'a layer')} has "
                        "weights that are not finite; use an intact checkpoint, or remove precision"
                    )
                quantised, expert_error = self.quantise(name, weights)
                for key, tensor in quantised.items():
                    if key not in parameters:
                        parameters[key] = tensor.new_empty((len(experts), *tensor.shape))
                    parameters[key][expert] = tensor
                error += expert_error
                squares += size
            delattr(layer, f"{name}_weight")
            for key, tensor in parameters.items():
                layer.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        self.relative_error = (error / squares) ** 0.5 if squares else None  # None: a blank expert of a packed layer
        super().process_weights_after_loading(layer)  # type: ignore[misc]


class Int8Experts(QuantisingMethod, CompressedTensorsW8A8Int8MoEMethod):
    """Int8 with a scale for each output channel."""

    bits = 8

    def __init__(self, moe: FusedMoEConfig) -> None:
        kind = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = QuantizationArgs(**kind, strategy="channel")
        super().__init__(weights, QuantizationArgs(**kind, strategy="token", dynamic=True), moe)

    def quantise(self, name: str, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        integers, scales, error = round_to_int8(weights)
        return {f"{name}_weight": integers, f"{name}_weight_scale": scales}, error

    def bytes_of(self, weight: torch.Tensor) -> int:
        return int8_bytes(weight.shape[1], weight.shape[2], current_platform.is_cpu())

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.w13_input_scale = layer.w2_input_scale = None  # type: ignore[assignment]


class Int4Experts(QuantisingMethod, CompressedTensorsWNA16MoEMethod):
    """Int4 in groups, rounded with the scales of least error.

    Args:
        moe: the layer's configuration.
        group: number of weights that share a scale.
    """

    bits = 4

    def __init__(self, moe: FusedMoEConfig, group: int) -> None:
        # vLLM offers its x86 kernel for all groups but those of 32; the kernel takes the group from the scales' shape.
        named = GROUPS[0] if current_platform.is_cpu() else group
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=named)
        super().__init__(weights, None, moe)
        self.group_size = group

    def quantise(self, name: str, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        integers, scales, error = round_to_int4(weights, self.group_size, weights.dtype)
        return {f"{name}_weight_packed": pack_int4(integers), f"{name}_weight_scale": scales}, error

    def bytes_of(self, weight: torch.Tensor) -> int:
        _, rows, columns = weight.shape
        return int4_bytes(rows, columns, self.group_size, current_platform.is_cpu(), weight.element_size())


def quantising_method(moe: FusedMoEConfig, bits: int, weights_on_input: bool) -> FusedMoEMethodBase:
    """Returns the method that quantises a layer's experts to `bits`, 8 or 4.

    Args:
        moe: the layer's configuration.
        bits: 8 or 4.
        weights_on_input: whether the layer applies router weights to the experts' input.

    Raises:
        AdapMoEError: no kernel of vLLM computes them, in this model or on this machine.
    """
    if moe.has_bias:
        raise AdapMoEError(
            f"precision={bits} does not work with this model: vLLM's kernels for it leave out the experts' biases; "
            "remove precision"
        )
    if weights_on_input and current_platform.is_cpu():
        raise AdapMoEError(
            f"precision={bits} does not work with this model: vLLM's CPU kernels for it do not take router weights on "
            "the experts' input; remove precision"
        )
    sizes = moe.hidden_dim, moe.intermediate_size_per_partition
    group = group_of(*sizes)
    if bits == 4 and group is None:
        raise AdapMoEError(
            f"precision=4 does not work with experts of {sizes[0]} by {sizes[1]} weights, which are not multiples of "
            f"{GROUPS[-1]}; set precision=8"
        )
    try:
        return Int8Experts(moe) if bits == 8 else Int4Experts(moe, group or 0)
    except (NotImplementedError, ValueError) as error:
        raise AdapMoEError(
            f"precision={bits}: vLLM has no kernel for {bits}-bit experts with this model's activation on "
            f"this device ({reason(error)}); remove precision"
        ) from None


def quantised_bytes(layer: RoutedExperts) -> int | None:
    """Returns the bytes of one expert once `precision` has quantised it; None: it leaves the experts as they are."""
    method = layer.quant_method
    if not isinstance(method, QuantisingMethod):
        return None
    return sum(method.bytes_of(getattr(layer, f"{name}_weight")) for name in WEIGHTS)


def log_rounding(layers: Sequence[RoutedExperts]) -> None:
    """Logs the rounding errors of layers whose weights have been quantised."""
    methods = [layer.quant_method for layer in layers if isinstance(layer.quant_method, QuantisingMethod)]
    errors = [100 * method.relative_error for method in methods if method.relative_error is not None]
    if not errors:
        return
    logger.info(
        "Expert cache: experts quantised to %d bits; relative errors of the weights, in %%, by layer: %s",
        methods[0].bits, ", ".join(f"{error:.2f}" for error in errors),
    )  # fmt: skip
