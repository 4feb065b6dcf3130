"""Interfaces of a MoE layer's collaborators: the loader; and step, gate, predictor and probe while it serves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Predicted
from vllm_adapmoe.integration.layers.gates import LayerGate
from vllm_adapmoe.store.base import ExpertsUnavailable


class Loading(Protocol):
    """Receives the experts of layers while weights load."""

    @property
    def device(self) -> torch.device:
        """Device of the slots."""

    @property
    def precision(self) -> int:
        """Bits per expert weight; 16: as in the checkpoint."""

    @property
    def all_resident(self) -> bool:
        """Whether there is a slot for every expert."""

    def add(self, layer: Any) -> int:
        """Registers a layer under construction; returns its index among the model's MoE layers."""

    def is_packed(self, layer: int) -> bool:
        """Returns whether a layer's experts are in the store already, so that its weights are not needed."""

    def record_names(self, layer: int) -> list[str]:
        """Returns the names of the pieces of each expert of a packed layer."""

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores the experts of a layer, one tensor `[experts, ...]` per piece."""

    def check(self, layer: int, blank: Mapping[str, torch.Tensor]) -> None:
        """Compares the kernel format of one expert with that of the store."""

    def check_shared(self, layer: RoutedExperts, names: Sequence[str]) -> None:
        """Refuses parameters that a layer's experts share, if the store cannot hold them."""


class LayerPrediction(NamedTuple):
    """Predictions made from the input of one event (one layer in one step)."""

    expected: np.ndarray | None
    """Probability that the layer's next event uses each expert, float32 `[experts]`; used to choose a victim."""
    prefetch: Callable[[], None]
    """Predicts later layers, for prefetch and trace; call it once, while the event's loads are in flight."""


class Predictor(Protocol):
    """Predicts experts from a layer's input."""

    @property
    def is_tracing(self) -> bool:
        """Whether every step's routing is recorded: on the host, except in steps that the GPU decides."""

    def predict(
        self,
        index: int,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        keep_mask: torch.Tensor | None,
        product: torch.Tensor | None = None,
    ) -> LayerPrediction | None:
        """Predicts from one event of layer `index`; None if predictions have failed."""

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Computes on the device what `predict` needs of the input; None if it needs nothing."""

    def record_on_device(self, index: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Records the router's ids and the weights after gating, `[tokens, top_k]`, without the host, for a trace."""

    def predict_on_device(self, index: int, x: torch.Tensor) -> Predicted | None:
        """Predicts from the input of layer `index` on the device; None if nothing does."""

    def skip_first_layer(self) -> None:
        """Begins a step whose first layer ran without the host."""


class Probe(Protocol):
    """Observes the routing of one layer while the model is measured."""

    def observe(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Records one step; returns the weights to use."""


class Step(Protocol):
    """The step that the worker is running."""

    @property
    def running(self) -> bool:
        """Whether it is a step of requests; False while vLLM profiles, warms up or captures graphs."""

    @property
    def tokens(self) -> int:
        """Number of rows of the step, without padding."""

    @property
    def fails_requests(self) -> bool:
        """Whether requests whose experts cannot be read are ended one by one."""

    def fail(self, failed_tokens: torch.Tensor, error: ExpertsUnavailable) -> None:
        """Ends the requests of the rows marked in bool `[rows]` with this step."""


@dataclass(frozen=True)
class Collaborators:
    """The collaborators of a serving layer, other than the cache that owns its slots."""

    step: Step
    gating: LayerGate | None = None
    predictor: Predictor | None = None
    probe: Probe | None = None
    deferred: DeferredRouting | None = None
    """Takes the routing of layers that run without the host; None on the CPU."""
    decode: DeviceDecode | None = None
    """Decides on the GPU in decode steps; None: the host decides in every step with a miss."""
