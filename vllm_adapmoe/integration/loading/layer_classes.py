"""Registers the classes of cached layers with vLLM, for the model that is being built."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.platforms import current_platform

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.collaborators import Loading
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts


@contextmanager
def cached_classes(loading: Loading) -> Iterator[None]:
    """Makes vLLM build cached layers inside the context, which hand their experts to `loading`.

    Classes that a model defines for its own experts count if the model has been imported.
    """
    names = []
    base = experts_base()
    for cls in _expert_classes(RoutedExperts):
        cached = type(f"Cached{cls.__name__}", (base, cls), {"loading": loading})
        PluggableLayer.register_oot(cached, name=cls.__name__)
        names.append(cls.__name__)
    try:
        yield
    finally:
        for name in names:
            del op_registry_oot[name]


def experts_base() -> type[CachedExperts]:
    """Returns the layer class that runs experts from slots on this platform."""
    return CachedExperts if current_platform.is_cpu() else MappedExperts


def _expert_classes(cls: type[RoutedExperts]) -> list[type[RoutedExperts]]:
    classes = [cls]
    for subclass in cls.__subclasses__():
        if not issubclass(subclass, CachedExperts):
            classes += _expert_classes(subclass)
    return classes
