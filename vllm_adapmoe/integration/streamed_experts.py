"""Routed experts whose weights stream into a store while vLLM loads them."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts

if TYPE_CHECKING:
    from vllm_adapmoe.integration.loading import ExpertLoading


class StreamedExperts(RoutedExperts):
    """Mixin over `RoutedExperts` or a model's own subclass of it: hands its experts to `loading` and keeps none."""

    loading: "ExpertLoading"
    cache_layer: int
    """Index among the model's MoE layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arrived: set[tuple[int, int, str]] = set()
        self._finished = False
        super().__init__(*args, **kwargs)

    def _get_quant_method(self, *args: Any, **kwargs: Any) -> FusedMoEMethodBase:
        # The weight loader dispatches on the name of the method's class, so its instance is wrapped, not its class.
        method = super()._get_quant_method(*args, **kwargs)
        create_weights = method.create_weights
        process_weights = method.process_weights_after_loading

        def create_on_host(layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
            before = set(dict(self.named_parameters()))
            with torch.device("cpu"):
                create_weights(layer, *args, **kwargs)
            self._foreign_parameters = before

        def finish(layer: nn.Module) -> None:
            self.finish_loading()

        self._process_weights: Callable[[nn.Module], None] = process_weights
        wrapped: Any = method
        wrapped.create_weights = create_on_host
        wrapped.process_weights_after_loading = finish
        method.requires_device_loading = False
        return method

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters `[local experts, ...]` of the quantisation method: what an expert's record is made of."""
        return {
            name: parameter
            for name, parameter in self.named_parameters(recurse=False)
            if name not in self._foreign_parameters
            and parameter.dim() > 0
            and parameter.shape[0] == self.local_num_experts
        }

    def weight_loader(  # type: ignore[override]
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if self.loading.restored:
            return True if return_success else None
        success = super().weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
        if success:
            self._arrived.add((id(param), expert_id, shard_id))
            if len(self._arrived) == self._expected_arrivals:
                self.finish_loading()
        return success if return_success else None

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    @cached_property  # asked for with every tensor of the checkpoint
    def _expected_arrivals(self) -> int:
        shards_of_w13 = 2 if self.moe_config.is_act_and_mul else 1
        shards = (shards_of_w13 if name.startswith("w13") else 1 for name in self.expert_parameters())
        return self.local_num_experts * sum(shards)

    def finish_loading(self) -> None:
        """Brings the loaded experts into the kernel's format, puts them into the store and frees them.

        Called as soon as the last weight of the layer has arrived, so that a model streams through memory layer by
        layer; and by vLLM after loading, for layers whose checkpoint does not hold every parameter.
        """
        if self._finished:
            return
        self._finished = True
        parameters = self.expert_parameters()
        if self.loading.restored:
            # The experts are in the store already; the kernel is built on one blank expert.
            for parameter in parameters.values():
                parameter.data = torch.zeros((1, *parameter.shape[1:]), dtype=parameter.dtype)
            self._process_weights(self)
            self.loading.check(self.cache_layer, {name: self.get_parameter(name).data for name in parameters})
        else:
            self._process_weights(self)
            if self.loading.all_resident:
                return
            parameters = self.expert_parameters()
            self.loading.put(self.cache_layer, {name: parameter.data for name, parameter in parameters.items()})
        for name in parameters:
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.new_empty(0)
