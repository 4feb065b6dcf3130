"""Inspects a model that vLLM has built, before its weights are read, where the configuration is not enough."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEError


@contextmanager
def around_weights(model_class: type[nn.Module], enter: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Runs `load_weights` of models of this class in a context that `enter` makes once the model is built.

    This works with every loader, whether or not the model passes the weights to its layers' weight loaders.
    """
    built: Any = model_class
    original, is_own_method = built.load_weights, "load_weights" in vars(model_class)

    @functools.wraps(original)
    def load_weights(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with enter():
            return original(model, *args, **kwargs)

    built.load_weights = load_weights
    try:
        yield
    finally:
        if is_own_method:
            built.load_weights = original
        else:
            del built.load_weights


def experts_built(layers: Sequence[RoutedExperts]) -> dict[str, int]:
    """Returns the fields of `ModelInfo` that need the built layers; the largest value where layers differ."""
    return {
        "num_layers": len(layers),
        "num_experts": max(layer.moe_config.num_experts for layer in layers),
        "top_k": max(layer.top_k for layer in layers),
    }


def check_layers(layers: Sequence[RoutedExperts], model: str, quantization: str | None) -> None:
    """Checks that the built layers can be served from a cache.

    Raises:
        AdapMoEError: there are no layers, or vLLM has no kernel for their quantisation on this device.
    """
    if not layers:
        raise AdapMoEError(
            f"model={model!r} has no routed experts that vLLM runs in its fused layer; remove moe_method"
        )
    for layer in layers:
        if not hasattr(layer.quant_method, "is_monolithic"):  # without a kernel this property raises
            raise AdapMoEError(
                f"quantization={quantization!r}: vLLM has no kernel for its experts on this "
                f"{current_platform.device_type}; remove it, or use a checkpoint in another format"
            )
