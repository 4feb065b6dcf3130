"""MoE layers whose expert weights stream into a store while vLLM loads them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.layers.collaborators import Loading
from vllm_adapmoe.integration.layers.expert_tensors import ExpertTensors, own_tensors
from vllm_adapmoe.integration.layers.heap import trim_heap
from vllm_adapmoe.integration.layers.mapped_memory import on_host
from vllm_adapmoe.integration.layers.precision import quantising_method

SHAPE = "_weight_shape"
"""Suffix of the shapes that compressed-tensors stores with packed weights. vLLM's reloading counts elements, and a
shape shared by two halves twice, so it considers a layer complete before its last shape has been loaded
(`online_process_loader` of 0.32)."""


class StreamedExperts(RoutedExperts):
    """Mixin over `RoutedExperts`, or a model's subclass of it, that passes its experts to `loading` and frees them."""

    loading: Loading
    cache_layer: int
    """Index among the model's MoE layers."""
    expert_tensors: ExpertTensors
    """Tensors whose memory slots replace; set when loading has finished, unless every expert is resident."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arrived: set[tuple[str, int | None, str]] = set()
        """Parameter, expert and shard of every weight that `weight_loader` has received."""
        self._first_arrivals: set[tuple[str, int | None, str]] | None = None
        """`_arrived` of the first load; set once weights are being or have been replaced."""
        self._finished = False
        self.serving = False
        """Whether the model is loaded and no weights are expected."""
        super().__init__(*args, **kwargs)

    def _get_quant_method(self, *args: Any, **kwargs: Any) -> FusedMoEMethodBase:
        # The weight loader dispatches on the class name of the method, so the instance is wrapped, not the class.
        if self.loading.precision == 16:
            method = super()._get_quant_method(*args, **kwargs)
        else:
            method = quantising_method(self.moe_config, self.loading.precision, self.apply_router_weight_on_input)
        create_weights = method.create_weights
        process_weights = method.process_weights_after_loading

        def create_on_host(layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
            before = set(dict(self.named_parameters()))
            with on_host():
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

    @property
    def finished(self) -> bool:
        """Whether the experts have been handed to `loading`."""
        return self._finished

    @property
    def has_arrivals(self) -> bool:
        """Whether `weight_loader` has received weights."""
        return bool(self._arrived)

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the quantisation method's parameters `[local experts, ...]`, from which records are made."""
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
        expert_id: int | None = None,  # optional, as in the weight loader of DBRX
        return_success: bool = False,
    ) -> bool | None:
        load: Any = super().weight_loader
        if self.serving:  # called by a trainer that loads into the running model's parameters
            if not self.loading.all_resident:
                raise AdapMoEError(
                    f"{weight_name} cannot be loaded into {self.layer_name}, whose experts are in slots; "
                    "call reload_weights with weights_iterator"
                )
            loaded = load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            return loaded if return_success else None
        if self.expert_map is not None and expert_id is not None and self.expert_map[expert_id] < 0:
            return False if return_success else None  # an expert of another rank
        if self.loading.is_packed(self.cache_layer):
            self._record_arrival(param, loaded_weight, shard_id, expert_id)
            return True if return_success else None
        if self._finished and self._first_arrivals is not None and weight_name.endswith(SHAPE):
            return True if return_success else None
        if self._finished:
            raise AdapMoEError(
                f"{self.layer_name}: the checkpoint has {weight_name}, which {type(self.quant_method).__name__} does "
                "not declare, after the layer was moved into the cache; remove moe_method"
            )
        success: bool = load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
        # Online quantisation first makes a dry run on meta parameters, to count what will be loaded.
        if success and not param.is_meta:
            self._record_arrival(param, loaded_weight, shard_id, expert_id)
            if len(self._arrived) == self._expected_arrivals():
                self.finish_loading()
        return success if return_success else None

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    @cached_property  # used for every tensor of the checkpoint
    def _loaded_names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.expert_parameters().items()}

    def _shards(self, name: str) -> tuple[str, ...]:
        """Returns the checkpoint's shard names of one expert in a parameter."""
        if not name.startswith("w13"):
            return ("w2",)
        return ("w1", "w3") if self.moe_config.is_act_and_mul else ("w1",)

    def _record_arrival(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: str | None, expert_id: int | None
    ) -> None:
        name = self._loaded_names.get(id(param))
        if name is None:
            return
        every_expert = expert_id is None or (loaded_weight.dim() == 3 and len(loaded_weight) == self.local_num_experts)
        for expert in range(self.local_num_experts) if every_expert else (expert_id,):
            for shard in self._shards(name) if shard_id is None else (shard_id,):
                self._arrived.add((name, expert, shard))

    def _expected_arrivals(self) -> int:
        # GPTQ allocates biases that few checkpoints have.
        biased = self.moe_config.has_bias or bool(self._loaded_expert_biases)
        names = [name for name in self._loaded_names.values() if biased or not name.endswith("_bias")]
        return self.local_num_experts * sum(len(self._shards(name)) for name in names)

    def begin_reload(self) -> None:
        """Prepares to receive every weight again, in parameters of their load-time shapes."""
        if self._first_arrivals is None:
            self._first_arrivals = self._arrived
        self._arrived, self._finished, self.serving = set(), False, False
        vars(self).pop("_loaded_names", None)

    def end_reload(self) -> None:
        """Ends a reload: expects no more weights, and looks up the experts' tensors, which vLLM has restored."""
        self._finished = self.serving = True
        if hasattr(self, "expert_tensors"):
            self.expert_tensors = ExpertTensors.of(own_tensors(self), list(self.expert_tensors.tensors))

    @property
    def loaded_by_weight_loader(self) -> bool:
        """Whether the experts were loaded by `weight_loader`, not by the model's own code."""
        return bool(self._arrived if self._first_arrivals is None else self._first_arrivals)

    @property
    def reloaded(self) -> bool:
        """Whether weights have arrived since `begin_reload` and are in the kernel's format."""
        return self._finished and bool(self._arrived)

    def missing_weight(self) -> str | None:
        """Describes a weight not yet received, if other weights have been since `begin_reload`; else None."""
        if not self._arrived:
            return None
        if self._first_arrivals:
            missing = sorted(
                (arrival for arrival in self._first_arrivals - self._arrived if not arrival[0].endswith(SHAPE)), key=str
            )
            return None if not missing else "{} of expert {} ({})".format(*missing[0])
        received, expected = len(self._arrived), self._expected_arrivals()  # the first weights were dummy weights
        return None if received >= expected else f"{expected - received} of {expected} tensors"

    def finish_loading(self) -> None:
        """Converts the loaded experts to the kernel's format, moves them into the store and frees them.

        Called as soon as the layer's last weight has arrived, so that a model streams through memory layer by layer;
        and by vLLM after loading, for layers whose checkpoint lacks some parameter.
        """
        if self._finished:
            return
        self._finished = True
        parameters = self.expert_parameters()
        self._move_to_device(parameters)
        loaded = own_tensors(self)  # referenced until the end, so that no id is reused
        foreign = {id(tensor) for tensor in loaded.values()} - {id(parameter) for parameter in parameters.values()}
        if self._first_arrivals is not None and current_platform.is_cpu():
            # If a kernel exists already, vLLM treats the weights as a GPU's and does not pack them for the CPU
            # (`UnquantizedFusedMoEMethod._setup_kernel`).
            self.quant_method.moe_kernel = None
        if self.loading.is_packed(self.cache_layer):
            names = self.loading.record_names(self.cache_layer)
            self._process_blank(parameters, names)
        else:
            self._process_weights(self)
            if self.loading.all_resident:
                if self.loading.precision != 16:
                    self._free_replaced(parameters)
                return
            processed = {path: tensor for path, tensor in own_tensors(self).items() if id(tensor) not in foreign}
            names = [path for path, tensor in processed.items() if _is_of_experts(path, tensor, self.local_num_experts)]
            filled = {path for path, tensor in processed.items() if isinstance(tensor, nn.Parameter) and tensor.numel()}
            self.loading.check_shared(self, sorted(filled - set(names)))
        tensors = {path: tensor for path, tensor in own_tensors(self).items() if id(tensor) not in foreign}
        self.expert_tensors = ExpertTensors.of(tensors, [name for name in names if name in tensors])
        self._check_weights()
        if self.loading.is_packed(self.cache_layer):
            self.loading.check(self.cache_layer, self.expert_tensors.tensors)
        else:
            self.loading.put(self.cache_layer, self.expert_tensors.tensors)
        self.expert_tensors.free()
        self._free_replaced(parameters)

    def _free_replaced(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Frees parameters that quantisation has replaced, to which a model's loader may still hold references."""
        in_use = {id(tensor) for tensor in own_tensors(self).values()}
        for parameter in parameters.values():
            if id(parameter) not in in_use:
                parameter.data = parameter.data.new_empty(0)
        trim_heap()

    def _move_to_device(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Moves the layer's weights to the device, where they are converted to the kernel's format layer by layer."""
        device = self.loading.device
        for name, parameter in self.named_parameters(recurse=False):
            blank = name in parameters and self.loading.is_packed(self.cache_layer)
            if name not in self._foreign_parameters and parameter.device != device and not blank:
                parameter.data = parameter.data.to(device)

    def _process_blank(self, parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> None:
        """Builds the kernel on one blank expert, as the real ones are in the store already, in the kernel's format."""
        for parameter in parameters.values():
            parameter.data = torch.zeros((1, *parameter.shape[1:]), dtype=parameter.dtype, device=self.loading.device)
        self._loaded_expert_biases.update(name for name in names if name.endswith("_bias"))
        with self._with_expert_count(1):
            self._process_weights(self)

    @contextmanager
    def _with_expert_count(self, count: int) -> Iterator[None]:
        """Makes the layer appear to have `count` experts to its quantisation method, inside the context."""
        counts = [
            (self, "local_num_experts"),
            (self, "num_experts"),
            (self.quant_method, "num_experts"),
            (self.moe_config, "num_local_experts"),
        ]
        before = [(holder, name, vars(holder)[name]) for holder, name in counts if name in vars(holder)]
        for holder, name, _ in before:
            setattr(holder, name, count)
        try:
            yield
        finally:
            for holder, name, value in before:
                setattr(holder, name, value)

    def _check_weights(self) -> None:
        """Checks that the weights are plain tensors: with any other kind, a kernel would not read the slots.

        Raises:
            AdapMoEError: the kernel keeps a weight in another form.
        """
        for name in ("w13_weight", "w2_weight"):
            weight = getattr(self, name, None)
            if not self.expert_tensors.holds(weight):
                raise AdapMoEError(
                    f"{type(self.quant_method).__name__} keeps {name} as {type(weight).__name__}, not as one tensor "
                    "with a row for each expert; use another quantization or moe_backend"
                )


def _is_of_experts(path: str, tensor: torch.Tensor, experts: int) -> bool:
    # Before 0.31 Marlin's methods keep their locks in a layer's `workspace`: 4 per multiprocessor, 512 on a 4090.
    return path != "workspace" and tensor.dim() > 0 and len(tensor) == experts and tensor.numel() > 0
