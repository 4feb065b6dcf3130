"""Predicts what layers will want from what runs through earlier ones, and records traces of it and of the routing."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import PrefetchConfig
from vllm_adapmoe.integration.worker.gate_stack import GateStack
from vllm_adapmoe.integration.worker.gate_trial import LinearGate
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.policy.prediction import PredictedExperts, predict_experts
from vllm_adapmoe.prefetch.heads import chance_of_any
from vllm_adapmoe.prefetch.request_experts import RequestExperts
from vllm_adapmoe.simulate.trace import SAMPLE, Step, TraceWriter, sample_rows

if TYPE_CHECKING:
    from vllm_adapmoe.integration.layers.cached_experts import CachedExperts


TRACE_LOOKAHEAD = 4
"""Later layers that a trace has predictions for at least."""
STRICT = "ADAPMOE_STRICT"
"""Environment variable: if set, a prediction that fails ends the engine, as the tests of this project want it."""

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format
P = ParamSpec("P")
T = TypeVar("T")


def layers_ahead(prefetch: PrefetchConfig, tracing: bool) -> int:
    """Later layers to look at: a trace has all that prefetch asks for, and what a replay might."""
    return max(TRACE_LOOKAHEAD, prefetch.lookahead) if tracing else prefetch.lookahead


@dataclass(frozen=True)
class LayerPrediction:
    """What the input of one event predicts."""

    expected: np.ndarray | None
    """float16 `[experts]`: chance that the layer's next event uses each; needed when somebody has to leave."""
    observe: Callable[[], None]
    """Predicts the later layers, for prefetch and the trace; to be called once, while the event's loads arrive."""


def _harmless(
    method: "Callable[Concatenate[ExpertPredictor, P], T]",
) -> "Callable[Concatenate[ExpertPredictor, P], T | None]":
    """Lets a step go on without predictions, from here to the end, when one fails."""

    @wraps(method)
    def run(self: "ExpertPredictor", /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.failed:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # no token depends on it, whatever it is
            if self.cache is not None:
                self.cache.transfers.check()  # what has ended the transfers is none of our predictions
            if os.environ.get(STRICT):
                raise
            self.give_up(error)
            return None

    return run


class ExpertPredictor:
    """Follows a worker's steps layer by layer.

    No token depends on it: whatever fails in here is said in the log, and the engine goes on without it.

    Args:
        layers: the model's MoE layers, in order.
        routers: theirs.
        cache: told of every routing and prediction; None where nothing is fetched ahead.
        lookahead: later layers to look at.
        heads: next-token heads of each layer; None: nobody asks for them.
        first: head of the first layer, `[hidden + 1, experts]`, for the end of the step before; None: there is none.
        experts: told what every request's next token is expected to use; None: nobody asks.
        trace: where steps are recorded, with every prediction; None: nowhere.
        requests: gives the ids and the computed tokens of the step's requests, and rows of each.
    """

    def __init__(
        self,
        layers: "list[CachedExperts]",
        routers: Routers,
        cache: ExpertCacheManager | None,
        lookahead: int,
        heads: Sequence[np.ndarray] | None,
        first: np.ndarray | None,
        experts: RequestExperts | None,
        trace: TraceWriter | None,
        requests: Callable[[], list[tuple[str, int, int]]],
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.experts = experts
        self.trace = trace
        self.requests = requests
        self.lookahead = lookahead
        self.failed = False
        """A prediction has, and there are none any more."""
        self.routers = routers
        self.top_k = max(layer.top_k for layer in layers)
        if heads is not None and [one.shape[1:] for one in heads] != [(count,) for count in routers.num_experts]:
            logger.warning("Expert cache: the profile's next-token heads are not of this model's shape, and not used")
            heads = first = None
        self.heads = heads
        self._first_head = first
        self.stacks: list[GateStack] = []
        """Of each layer, its head and the gates of those after it."""
        self.first: torch.Tensor | None = None
        self.last_rows: torch.Tensor | None = None
        """Of the step under way, the last row of each request; None: every row is one."""
        self.begun: np.ndarray | None = None
        """What was known of the step before it began."""
        self._at_the_end: HostCopy | None = None
        """Of the last step, what its hidden states predict, on its way to the host."""
        self.step: Step | None = None
        """Under way, or not in the trace yet."""
        self._whole = False
        """All layers of `step` are recorded."""

    @torch.inference_mode()
    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Tries every router, and builds every layer's stack of gates now, and not when the first request comes.

        By then vLLM's KV cache has taken all memory that was left.

        Args:
            dtype: of the experts' input.
            device: of the model.
        """
        ahead = self.lookahead if self.cache is not None or self.trace is not None else 0
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
        self.first = None if self._first_head is None else torch.from_numpy(self._first_head).to(device)

    def follow_weights(self, dtype: torch.dtype, device: torch.device) -> None:
        """Learns the routers anew: the model's weights have been replaced."""
        if not self.failed:
            self.routers.follow_weights()
            self.prepare(dtype, device)

    def give_up(self, error: Exception) -> None:
        """Predicts and records nothing from here on."""
        logger.error("Expert cache: a prediction failed, and there are none any more", exc_info=error)
        self.failed = True
        self.cache = self.heads = self.experts = self.step = self.first = self.begun = self._at_the_end = None
        if self.trace is not None:
            self.trace.file.close()  # what of the last frame cannot be written is left out when it is read
            self.trace = None

    @_harmless
    def begin_step(self, rows: Mapping[str, int]) -> None:
        """A step with so many rows of each request is about to run: fetches for its first layers."""
        self._take_the_end()
        self._at_the_end = None  # too late, if it has not arrived
        self.begun = None if self.experts is None else self.experts.of_any(list(rows), self.lookahead)
        if self.cache is not None:
            prompt_tokens = sum(count for count in rows.values() if count > 1)
            self.cache.begin_step(prompt_tokens, () if self.begun is None else list(self.begun))

    @_harmless
    def predict(
        self,
        index: int,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        keep: torch.Tensor,
        product: torch.Tensor | None = None,
    ) -> LayerPrediction:
        """One event of layer `index`.

        Args:
            index: of the layer.
            x: `[tokens, hidden]`, without padding.
            weights: `[tokens, top_k]`, after gating.
            ids: `[tokens, top_k]`, on the host.
            keep: bool of the same shape, on the host.
            product: what `product` gave for this input, on the host.
        """
        if index == 0:
            self._begin_step(len(x))
        stack = self.stacks[index]
        outputs = None if product is None else product.numpy()
        expected = None
        if self.heads is not None:  # who leaves for this event depends on it, so it cannot wait
            last = self.last_rows
            if outputs is not None:
                heads = outputs if last is None else outputs[last.numpy()]
            else:
                heads = stack.outputs(x if last is None else x[last.to(x.device)])
            expected = chance_of_any(heads[:, stack.width :])
            if self.experts is not None:
                self.experts.predicted(index, heads[:, stack.width :])
            if last is None and len(x) <= SAMPLE:
                outputs = heads
        elif self.experts is not None:
            self.experts.used(index, (ids if self.last_rows is None else ids[self.last_rows]).numpy())
        return LayerPrediction(expected, partial(self._observe, index, x, weights, ids, keep, expected, outputs))

    @_harmless
    def product(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """What `predict` will want of a decode step's input, on the device, to be read with the routing at once."""
        stack = self.stacks[index]
        wanted = self.heads is not None or ((self.cache is not None or self.trace is not None) and any(stack.slices))
        return stack.product(x) if wanted and len(x) <= SAMPLE else None

    @_harmless
    def pass_first_layer(self) -> None:
        """A step begins whose first layer has left nothing to predict."""
        self._begin_step(None)

    def _begin_step(self, tokens: int | None) -> None:
        """Of so many rows without padding; None: those of the step's requests, and nothing to record of them."""
        requests = self.requests()
        rows = [rows for _, _, rows in requests]
        self.last_rows = None
        if len(rows) < (sum(rows) if tokens is None else tokens) == sum(rows):
            self.last_rows = torch.tensor(rows).cumsum(0) - 1
        if self.experts is not None:
            self.experts.begin([name for name, _, _ in requests])
        if self.trace is None or tokens is None:
            return
        self._end_trace_of_step()
        self._whole = False
        self.step = Step(
            seconds=time.monotonic(),
            requests=[name for name, _, rows in requests for _ in range(rows)],
            positions=np.concatenate([np.arange(start, start + rows) for _, start, rows in requests]),
            ids=np.zeros((len(self.layers), tokens, self.top_k), dtype=np.int64),
            weights=np.zeros((len(self.layers), tokens, self.top_k), dtype=np.float16),
            predicted={},
            begin=self.begun,
        )

    @_harmless
    def _observe(
        self,
        index: int,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        keep: torch.Tensor,
        expected: np.ndarray | None,
        outputs: np.ndarray | None,
    ) -> None:
        if self.cache is None and self.trace is None:
            return
        stack = self.stacks[index]
        predicted: dict[int, PredictedExperts | None] = {}

        def predict_experts(distance: int) -> PredictedExperts | None:
            nonlocal outputs
            columns = stack.slices[distance - 1] if distance <= len(stack.slices) else None
            if distance not in predicted and columns is not None:
                if outputs is None:
                    outputs = stack.outputs(x[sample_rows(len(x))])
                predicted[distance] = self._predict_experts(index + distance, outputs[:, columns])
            return predicted.get(distance)

        routing = ids.numpy(), keep.numpy()
        if self.cache is not None:
            self.cache.prefetch(index, routing, predict_experts)
        if self.trace is not None:
            self._record(index, weights, *routing, expected)
            predictions = {distance: predict_experts(distance) for distance in range(1, len(stack.slices) + 1)}
            if self.step is not None:
                self.step.predicted |= {
                    (index, distance): one for distance, one in predictions.items() if one is not None
                }

    @_harmless
    def end_step(self, hidden: torch.Tensor) -> None:
        """The model has run: what the first layer will want next.

        Args:
            hidden: `[requests, hidden]`, last hidden states of the rows that a token is sampled from.
        """
        if self.first is None or len(hidden) > SAMPLE or hidden.shape[1] != len(self.first) - 1:
            return
        # Nobody waits for it: from a GPU it is taken in when the next step begins.
        self._at_the_end = HostCopy(torch.addmm(self.first[-1], hidden.float(), self.first[:-1]))
        self._take_the_end()

    def _take_the_end(self) -> None:
        if self._at_the_end is None or not self._at_the_end.arrived:
            return
        chances, self._at_the_end = self._at_the_end.tensors[0].numpy(), None
        ids = np.argsort(-chances, axis=1, kind="stable")[:, : self.layers[0].top_k]
        predicted = PredictedExperts(ids, np.ones(ids.shape, dtype=bool))
        if self.cache is not None:
            self.cache.prefetch(-1, None, {1: predicted}.get)
        if self.step is not None:
            self.step.predicted[-1, 1] = predicted
            self._end_trace_of_step()

    @_harmless
    def record_in_place(self, requests: Sequence[tuple[str, int, int]], ids: np.ndarray) -> None:
        """A step has run without the host: remembers what its requests used.

        Args:
            requests: id, first position and rows of each.
            ids: integer `[layers, tokens, top_k]`, -1: dropped.
        """
        if self.experts is None:
            return
        last = np.cumsum([rows for _, _, rows in requests]) - 1
        self.experts.begin([name for name, _, _ in requests])
        for index, layer_ids in enumerate(ids[:, last]):
            self.experts.used(index, np.where(layer_ids < 0, layer_ids.max(1, keepdims=True), layer_ids))
        self.experts.end()

    def _predict_experts(self, target: int, logits: np.ndarray) -> PredictedExperts:
        layer = self.layers[target]
        correction = self.routers.corrections[target]
        if layer.gating is None or layer.gating.plan.rule not in ("token", "batch"):
            return predict_experts(logits, layer.top_k, correction=correction)
        by_batch = layer.gating.plan.rule == "batch"
        return predict_experts(
            logits, layer.top_k, layer.gating.sensitivity, layer.gating.threshold, by_batch, correction=correction
        )

    def _record(
        self,
        index: int,
        weights: torch.Tensor,
        ids: np.ndarray,
        keep: np.ndarray,
        expected: np.ndarray | None,
    ) -> None:
        step = self.step
        if step is None or len(step.positions) != len(ids):
            return
        chosen = ids.shape[1]  # fewer than in other layers: the rest counts as dropped
        step.ids[index, :, :chosen] = ids
        # A kept weight is never zero, or the expert would count as dropped.
        step.weights[index, :, :chosen] = np.where(keep, np.maximum(weights.cpu().numpy(), 1e-6), 0)
        if expected is not None:
            step.expected[index] = expected
        self._whole = index == len(self.layers) - 1

    def _end_trace_of_step(self) -> None:
        if self.step is not None and self.trace is not None and self._whole:
            self.trace.add(self.step)
        self.step = None

    def close(self) -> None:
        """Ends the trace."""
        self._end_trace_of_step()
        if self.trace is not None:
            self.trace.close()
