"""Predicts the experts of later layers from earlier layers' inputs, and records predictions and routing in traces."""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device.layer_input import Predicted
from vllm_adapmoe.device.step_trace import StepTrace, read_copy
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.collaborators import LayerPrediction
from vllm_adapmoe.integration.layers.mapped_experts import to_device
from vllm_adapmoe.integration.worker.current_step import CurrentStep, LaunchedStep, Requests
from vllm_adapmoe.integration.worker.gate_stack import GateStack
from vllm_adapmoe.integration.worker.gate_trial import LinearGate
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.integration.worker.step_recorder import StepRecorder
from vllm_adapmoe.policy.chances import chance_of_any
from vllm_adapmoe.policy.prediction import PredictedExperts, predict_experts
from vllm_adapmoe.prefetch.request_experts import RequestExperts
from vllm_adapmoe.scheduling.report import prompt_rows
from vllm_adapmoe.simulate.trace import SAMPLE, sample_rows

STRICT = "ADAPMOE_STRICT"
"""Environment variable; if set, a failed prediction ends the engine. Set by this project's tests."""

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format
P = ParamSpec("P")
T = TypeVar("T")


def _disabled_by_errors(
    method: "Callable[Concatenate[ExpertPredictor, P], T]",
) -> "Callable[Concatenate[ExpertPredictor, P], T | None]":
    """Wraps a method so that an error disables predictions from then on instead of ending the step."""

    @wraps(method)
    def run(self: "ExpertPredictor", /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.failed:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # no token depends on predictions, so any error may be ignored
            if self.cache is not None:
                self.cache.transfers.check()  # but not one that ended the transfers
            if os.environ.get(STRICT):
                raise
            self.give_up(error)
            return None

    return run


def _nothing() -> None:
    """Prefetches nothing."""


class ExpertPredictor:
    """Predicts experts during a worker's steps, layer by layer, for prefetch, eviction, scheduling and traces.

    No token depends on it: an error in here is logged, and the engine continues without predictions.

    Args:
        layers: the model's MoE layers, in order.
        routers: the routers of those layers.
        cache: receives every routing and prediction; None without prefetch.
        lookahead: number of later layers to predict.
        heads: next-token heads of each layer; None if not used.
        first: head `[hidden + 1, experts]` that predicts the first layer from the end of the step before; or None.
        experts: receives the experts that each request's next token is expected to use; None if not used.
        recorder: records steps with every prediction; None: no recording.
        current: the worker's current step.
    """

    def __init__(
        self,
        layers: Sequence[CachedExperts],
        routers: Routers,
        cache: ExpertCacheManager | None,
        lookahead: int,
        heads: Sequence[np.ndarray] | None,
        first: np.ndarray | None,
        experts: RequestExperts | None,
        recorder: StepRecorder | None,
        current: CurrentStep,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.experts = experts
        self.recorder = recorder
        self.current = current
        self.lookahead = lookahead
        self.failed = False
        """Whether a prediction has failed, which disables all further ones."""
        self.routers = routers
        self.top_k = max(layer.top_k for layer in layers)
        if heads is not None and [head.shape[1:] for head in heads] != [(count,) for count in routers.num_experts]:
            logger.warning(
                "Expert cache: the profile's next-token heads have another shape than this model, and are not used"
            )
            heads = first = None
        self.heads = heads
        self._first_head = first
        self.stacks: list[GateStack] = []
        """Gate stack of each layer: the gates of later layers, and its own next-token head."""
        self.first: torch.Tensor | None = None
        self.last_rows: torch.Tensor | None = None
        """Index of each request's last row in the current step; None: every row is a last row. Of the rows that verify
        draft tokens it is the last, too: which ones are accepted is known only after the step, and the last one's next
        token is the only one that certainly has not run yet."""
        self.expected_at_start: np.ndarray | None = None
        """Experts that the step is expected to use, predicted before it begins."""
        self._corrections: dict[int, torch.Tensor] = {}
        """Corrections of routers on the device, by layer."""
        self._captured: list[GateStack] = []
        """Stacks from before weights were replaced, whose memory CUDA graphs may read."""
        self._first_layer: HostCopy | None = None
        """First-layer prediction from the last step's hidden states, in flight to the host."""
        self.trace: StepTrace | None = None
        """Takes the trace of steps that the GPU decides. Kept after an error: CUDA graphs may write to it."""
        self._launched: LaunchedStep | None = None
        """The current step if the GPU decides it and it is traced."""
        self._unwritten: deque[tuple[LaunchedStep, HostCopy, np.ndarray]] = deque()
        """Steps that have run and are not in the trace yet: arguments of `_record_traced`."""

    @property
    def is_tracing(self) -> bool:
        """Whether every step is recorded."""
        return self.recorder is not None

    @torch.inference_mode()
    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Tests every router and builds every layer's stack of gates, before vLLM's KV cache takes the free memory.

        Args:
            dtype: dtype of the experts' input.
            device: device of the model.
        """
        ahead = self.lookahead if self.cache is not None or self.recorder is not None else 0
        gates: dict[int, LinearGate | None] = {}
        self.stacks = []
        for index, layer in enumerate(self.layers):
            later = range(index + 1, min(index + 1 + ahead, len(self.layers)))
            for target in later:
                if target not in gates:
                    gates[target] = self.routers.linear(target, dtype, device)
            head = None if self.heads is None else self.heads[index]
            self.stacks.append(GateStack([gates[target] for target in later], head, layer.hidden_size, device))
            gates.pop(index + 1, None)
        self.routers.report()
        for target, tensor in self._corrections.items():
            tensor.copy_(torch.from_numpy(np.asarray(self.routers.corrections[target])))
        self.first = None if self._first_head is None else torch.from_numpy(self._first_head).to(device)

    def trace_on_device(self, tokens: int, device: torch.device) -> None:
        """Allocates what steps of at most `tokens` that the GPU decides are traced with, before graphs are captured."""
        if self.recorder is not None:
            columns = max(stack.columns for stack in self.stacks)
            self.trace = StepTrace(len(self.layers), tokens, self.top_k, columns, device)

    @torch.inference_mode()
    def follow_weights(self, dtype: torch.dtype, device: torch.device) -> None:
        """Reads the routers again after the model's weights have been replaced."""
        if not self.failed:
            self.routers.follow_weights()
            before = self.stacks
            self.prepare(dtype, device)
            # CUDA graphs hold the addresses of the tensors that they were captured with.
            self.stacks = [old if old.follow(new) else new for old, new in zip(before, self.stacks, strict=True)]
            self._captured += before

    def give_up(self, error: Exception) -> None:
        """Stops predicting and recording for good, and logs the error."""
        logger.error("Expert cache: a prediction failed; predictions are off until the engine restarts", exc_info=error)
        self.failed = True
        self.cache = self.heads = self.experts = self.first = self.expected_at_start = self._first_layer = None
        if self.recorder is not None:
            self.recorder.give_up()
            self.recorder = None

    @_disabled_by_errors
    def begin_step(self, rows: Mapping[str, int]) -> None:
        """Prefetches for the first layers of a step about to run; `rows`: number of rows of each request."""
        if self.cache is None or not self.cache.lent:  # a GPU that decides does not prefetch by it
            self._take_first_layer()
        self._first_layer = None  # a prediction that has not arrived by now is too late
        self._launched = None
        self.expected_at_start = None if self.experts is None else self.experts.batch_chances(list(rows))
        if self.cache is not None:
            self.cache.prefetch_first_layers(
                prompt_rows(rows, self.current.drafts),
                () if self.expected_at_start is None else list(self.expected_at_start),
            )

    @_disabled_by_errors
    def predict(
        self,
        index: int,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        keep_mask: torch.Tensor | None,
        product: torch.Tensor | None = None,
    ) -> LayerPrediction:
        """Predicts from one event of layer `index`.

        Args:
            index: index of the layer.
            x: experts' input `[tokens, hidden]`, without padding.
            weights: router weights `[tokens, top_k]`, after gating.
            ids: chosen experts `[tokens, top_k]`, on the host.
            keep_mask: experts that gating keeps, bool `[tokens, top_k]`, on the host; None: all.
            product: result of `product` for this input, on the host; None: not computed.
        """
        if index == 0:
            self._read_requests(x.shape[0])
        stack = self.stacks[index]
        outputs = None if product is None else product.numpy()
        expected = None
        if self.heads is not None:  # not in `_prefetch`: the victims of this event depend on it
            last = self.last_rows
            if outputs is not None:
                head_outputs = outputs if last is None else outputs[last.numpy()]
            else:
                head_outputs = stack.outputs(x if last is None else x[last.to(x.device)])
            expected = chance_of_any(head_outputs[:, stack.width :])
            if self.experts is not None and index < self.experts.layers:
                self.experts.record_prediction(index, head_outputs[:, stack.width :])
            if last is None and x.shape[0] <= SAMPLE:
                outputs = head_outputs
        elif self.experts is not None and index < self.experts.layers:
            self.experts.record_used(index, (ids if self.last_rows is None else ids[self.last_rows]).numpy())
        if not self._uses_routing(index):
            return LayerPrediction(expected, _nothing)
        return LayerPrediction(expected, partial(self._prefetch, index, x, weights, ids, keep_mask, expected, outputs))

    @_disabled_by_errors
    def product(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Computes on the device what `predict` needs of a decode step's input, to be copied with the routing."""
        stack = self.stacks[index]
        needed = self.heads is not None or (self._looks_ahead(index) and any(stack.slices))
        return stack.product(x) if needed and len(x) <= SAMPLE else None

    def _looks_ahead(self, index: int) -> bool:
        """Returns whether later layers are predicted from the input of layer `index`."""
        planner = None if self.cache is None else self.cache.controller.planner
        return self.recorder is not None or (planner is not None and planner.has_targets(index))

    def _uses_routing(self, index: int) -> bool:
        """Returns whether later layers are predicted from layer `index`, or its routing was predicted before."""
        planner = None if self.cache is None else self.cache.controller.planner
        return (planner is not None and bool(planner.pending[index])) or self._looks_ahead(index)

    @_disabled_by_errors
    def predict_on_device(self, index: int, x: torch.Tensor) -> Predicted | None:
        """Predicts from the input of layer `index` without the host, as operations that a CUDA graph can hold.

        Args:
            index: index of the layer.
            x: experts' input `[tokens, hidden]`.
        """
        stack = self.stacks[index]
        columns = stack.slices[0] if stack.slices and self.cache is not None else None
        if columns is None and self.heads is None and (self.trace is None or not stack.columns):
            return None
        outputs = stack.product(x)
        if self.trace is not None:
            self.trace.record_product(index, outputs)
        if columns is None:
            return Predicted(outputs, stack.width)
        rank = outputs[:, columns]
        correction = self.routers.corrections[index + 1]
        if correction is not None:
            rank = rank.sigmoid() + self._on_device(index + 1, correction, x.device)
        ahead = rank.topk(min(self.layers[index + 1].top_k, rank.shape[1]), dim=1).indices
        return Predicted(outputs, stack.width, ahead)

    @_disabled_by_errors
    def record_on_device(self, index: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Records the routing of layer `index` without the host, if a trace needs it (`StepTrace.record`)."""
        if self.trace is not None:
            self.trace.record(index, ids, weights)

    @_disabled_by_errors
    def begin_on_device(self, step: LaunchedStep) -> None:
        """Begins a step that the GPU decides, before its launch."""
        if self.trace is not None:
            self.trace.begin_step()
            step.drafts, step.expected_at_start = self.current.drafts, self.expected_at_start
            self._launched = step

    @_disabled_by_errors
    def end_on_device(self, step: LaunchedStep) -> None:
        """Starts copying what a trace needs of a step that the GPU decides, after its launch."""
        if self.trace is not None:
            step.traced = self.trace.copy(sum(rows for _, _, rows in step.requests))

    def _on_device(self, index: int, correction: np.ndarray, device: torch.device) -> torch.Tensor:
        """Returns a router's correction on the device; copied at the first call, before a graph is captured."""
        if index not in self._corrections:
            self._corrections[index] = torch.from_numpy(np.asarray(correction)).to(device)
        return self._corrections[index]

    @_disabled_by_errors
    def skip_first_layer(self) -> None:
        """Begins a step whose first layer ran without the host, so that nothing is predicted from it."""
        self._read_requests(None)

    def _read_requests(self, tokens: int | None) -> None:
        """Begins a step of `tokens` rows without padding; None: as many as its requests have, without recording."""
        requests = self.current.requests()
        rows = [rows for _, _, rows in requests]
        self.last_rows = None
        if len(rows) < (sum(rows) if tokens is None else tokens) == sum(rows):
            self.last_rows = torch.tensor(rows).cumsum(0) - 1
        if self.experts is not None:
            self.experts.begin([name for name, _, _ in requests])
        if self.recorder is not None and tokens is not None:
            self.recorder.begin(requests, tokens, self.expected_at_start, self.current.drafts, time.monotonic())

    @_disabled_by_errors
    def _prefetch(
        self,
        index: int,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        keep_mask: torch.Tensor | None,
        expected: np.ndarray | None,
        outputs: np.ndarray | None,
    ) -> None:
        stack = self.stacks[index]
        predicted: dict[int, PredictedExperts | None] = {}

        def predict_experts(distance: int) -> PredictedExperts | None:
            nonlocal outputs
            columns = stack.slices[distance - 1] if distance <= len(stack.slices) else None
            if distance not in predicted and columns is not None:
                if outputs is None:
                    outputs = stack.outputs(x if x.shape[0] <= SAMPLE else x[sample_rows(x.shape[0])])
                predicted[distance] = self._predict_experts(index + distance, outputs[:, columns])
            return predicted.get(distance)

        host_ids = ids.numpy()
        routing = host_ids, host_ids >= 0 if keep_mask is None else keep_mask.numpy()
        if self.cache is not None:
            self.cache.prefetch(index, routing, predict_experts)
        if self.recorder is not None:
            self.recorder.record(index, weights.cpu().numpy(), *routing, expected)
            self.recorder.add_predictions(
                index, {distance: predict_experts(distance) for distance in range(1, len(stack.slices) + 1)}
            )

    @_disabled_by_errors
    def end_step(self, hidden: torch.Tensor) -> None:
        """Predicts the first layer of the next step, after the model has run.

        Args:
            hidden: `[rows, hidden]`, last hidden states of the rows that tokens are sampled from: one of each request,
                and one more for each draft token that the step verifies.
        """
        if self.first is None:
            return
        hidden = self._of_last_rows(hidden)
        if len(hidden) > SAMPLE or hidden.shape[1] != len(self.first) - 1:
            return
        # Does not block: a GPU's result is used when the next step begins.
        self._first_layer = HostCopy(torch.addmm(self.first[-1], hidden.float(), self.first[:-1]))
        if self._launched is not None:
            self._launched.first_layer = self._first_layer
        if self.cache is None or not self.cache.lent:  # else when the host decides again
            self._take_first_layer()

    def _of_last_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the last of the sampled rows of each request, as in `last_rows`."""
        drafts = self.current.drafts
        if not drafts:
            return hidden
        ends = torch.tensor([1 + len(drafts.get(name, ())) for name, _, _ in self.current.requests()]).cumsum(0)
        return hidden[to_device(ends - 1, hidden.device)] if int(ends[-1]) == len(hidden) else hidden

    def _take_first_layer(self) -> None:
        if self._first_layer is None or not self._first_layer.arrived:
            return
        predicted, self._first_layer = self._predict_first_layer(self._first_layer), None
        if self.cache is not None:
            self.cache.prefetch(-1, None, {1: predicted}.get)
        if self.recorder is not None and self._launched is None:
            self.recorder.add_predictions(-1, {1: predicted})
            self.recorder.end()

    def _predict_first_layer(self, logits: HostCopy) -> PredictedExperts:
        ids = np.argsort(-logits.tensors[0].numpy(), axis=1, kind="stable")[:, : self.layers[0].top_k]
        return PredictedExperts(ids, np.ones(ids.shape, dtype=bool))

    @_disabled_by_errors
    def record_finished(self, step: LaunchedStep, ids: np.ndarray) -> None:
        """Records a step that the GPU has decided: the experts that its requests used, and its trace.

        Args:
            step: the step; steps come in order.
            ids: integer `[layers, tokens, top_k]`, -1 for dropped.
        """
        if self.experts is not None:
            self._record_used(self.experts, step.requests, ids)
        if self.recorder is not None and step.traced is not None:
            self._unwritten.append((step, step.traced, ids >= 0))
            self._write_traced(self.recorder)

    def _write_traced(self, recorder: StepRecorder) -> None:
        """Records finished steps in order, up to one whose prediction of the first layer has not arrived yet."""
        while self._unwritten and ((first := self._unwritten[0][0].first_layer) is None or first.arrived):
            self._record_traced(recorder, *self._unwritten.popleft())

    @_disabled_by_errors
    def write_all_traced(self) -> None:
        """Waits for all that finished steps have predicted, and records them."""
        for step, _, _ in self._unwritten:
            if step.first_layer is not None:
                step.first_layer.wait()
        if self.recorder is not None:
            self._write_traced(self.recorder)

    def _record_used(self, experts: RequestExperts, requests: Requests, ids: np.ndarray) -> None:
        last = np.cumsum([rows for _, _, rows in requests]) - 1
        experts.begin([name for name, _, _ in requests])
        for index, layer_ids in enumerate(ids[: experts.layers, last]):
            experts.record_used(index, np.where(layer_ids < 0, layer_ids.max(1, keepdims=True), layer_ids))
        experts.end()

    def _record_traced(self, recorder: StepRecorder, step: LaunchedStep, copy: HostCopy, kept: np.ndarray) -> None:
        """Records what a step that the host decides records layer by layer; `kept`: bool `[layers, tokens, top_k]`."""
        ids, weights, products = read_copy(copy)
        recorder.begin(step.requests, ids.shape[1], step.expected_at_start, step.drafts, step.seconds)
        for index, (layer, stack) in enumerate(zip(self.layers, self.stacks, strict=True)):
            choices = index, slice(None), slice(layer.top_k)
            outputs = products[index, :, : stack.columns]
            # Over all rows, as the GPU does, which does not know the last row of each request.
            expected = None if self.heads is None else chance_of_any(outputs[:, stack.width :])
            recorder.record(index, weights[choices], ids[choices], kept[choices], expected)
            recorder.add_predictions(
                index,
                {
                    distance: None if columns is None else self._predict_experts(index + distance, outputs[:, columns])
                    for distance, columns in enumerate(stack.slices, 1)
                },
            )
        if step.first_layer is not None:
            recorder.add_predictions(-1, {1: self._predict_first_layer(step.first_layer)})
        recorder.end()

    def _predict_experts(self, target: int, logits: np.ndarray) -> PredictedExperts:
        layer = self.layers[target]
        correction = self.routers.corrections[target]
        if layer.gating is None or layer.gating.plan.rule not in ("token", "batch"):
            return predict_experts(logits, layer.top_k, correction=correction)
        by_batch = layer.gating.plan.rule == "batch"
        return predict_experts(
            logits, layer.top_k, layer.gating.sensitivity, layer.gating.threshold, by_batch, correction=correction
        )

    def close(self) -> None:
        """Completes and closes the trace."""
        if self.recorder is not None:
            self.recorder.close()
