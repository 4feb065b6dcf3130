"""vLLM's MoE layer with experts in the expert cache: its parameters are replaced by slots."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import envs
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_adapmoe.cache.manager import Acquisition, ExpertCacheManager
from vllm_adapmoe.gating.rules import Gated, gate_tokens
from vllm_adapmoe.integration.layers.collaborators import Collaborators, LayerPrediction, Predictor, Probe, Step
from vllm_adapmoe.integration.layers.gates import LayerGate
from vllm_adapmoe.integration.layers.step_routing import StepRouting, read_together
from vllm_adapmoe.integration.layers.streamed_experts import StreamedExperts
from vllm_adapmoe.policy.compiled import compiled
from vllm_adapmoe.policy.events import waves
from vllm_adapmoe.store.base import ExpertsUnavailable

NO_EXPERTS = np.empty(0, dtype=np.int64)
MIN_PAIRS, MIN_BYTES = 16, 4 << 20
"""Minimum number of pairs, or of bytes of their experts, that run by themselves while other experts are in flight. A
call of the kernel costs 0.1 ms whatever it computes, in which it reads a megabyte: with 128 experts of 0.3 MiB, gated
decode steps took up to 1.8 times the kernel time of ungated ones while every arrival ran by itself."""


class Pairs(NamedTuple):
    """Pairs of a token and an expert that it keeps, on the host."""

    token: torch.Tensor
    """Rows of the experts' input, int64 `[pairs]`."""
    weights: torch.Tensor
    """Float32 `[pairs, 1]`."""
    ids: np.ndarray
    """Logical expert ids, int64 `[pairs]`."""

    def take(self, rows: np.ndarray) -> "Pairs":
        """Returns the pairs of these indices."""
        index = torch.from_numpy(rows)
        return Pairs(self.token[index], self.weights[index], self.ids[rows])


class CachedExperts(StreamedExperts):
    """Mixin over `RoutedExperts`, or a model's subclass of it, that runs experts from the slots of a cache.

    While weights load, the layer passes its experts to `loading` and frees them. Afterwards its parameters are the
    tensors of a slot pool, `[slots, ...]`, shared with other layers, and `cache` maps experts to slots. If every
    expert fits, `cache` stays None; without a gate, the layer then runs vLLM's own code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cache: ExpertCacheManager | None = None
        self._expert_bytes = 0
        self.gating: LayerGate | None = None
        self.probe: Probe | None = None
        self.predictor: Predictor | None = None
        self.step: Step | None = None
        """None until the model is loaded: every step before is a dummy run."""
        self.gates_in_model = False
        """Whether `forward_modular` gates; `torch.compile` traces the value at the model's first call."""
        self.gate_limits = torch.zeros(2, dtype=torch.float64, device=self.loading.device)
        """The gate's sensitivity and threshold. An input of the compiled model, not constants in it: all layers share a
        kernel, and another plan takes effect. One tensor, because Dynamo makes Python floats of those of one number."""
        self.cache_layer = self.loading.add(self)
        super().__init__(*args, **kwargs)

    def bind(self, collaborators: Collaborators) -> None:
        """Sets the layer's collaborators, once the model is loaded and whenever one of them changes."""
        self.step = collaborators.step
        self.gating = collaborators.gating
        self.predictor = collaborators.predictor
        self.probe = collaborators.probe
        # Residency is known to the host only, and a probe sees the weights before they are gated.
        self.gates_in_model = self.gating is not None and self.gating.plan.rule == "token" and self.probe is None
        if self.gating is not None:
            self.gate_limits[0], self.gate_limits[1] = self.gating.sensitivity, self.gating.threshold

    def use_cache(self, cache: ExpertCacheManager) -> None:
        """Serves from the slots of `cache`. The tensor objects stay the same, because kernels keep references."""
        self.cache = cache
        pool = cache.pool(self.cache_layer)
        self._expert_bytes = pool.layout.nbytes
        self.global_num_experts = pool.num_slots  # kernels count the rows of the weights, which are slots now
        self.expert_tensors.replace(pool.tensors)

    def begin_reload(self) -> None:
        super().begin_reload()
        self.global_num_experts = self.moe_config.num_experts

    def end_reload(self) -> None:
        super().end_reload()
        if self.cache is not None:
            self.use_cache(self.cache)

    def finish_loading(self) -> None:
        super().finish_loading()
        if self.cache is not None:  # weights are replaced while the engine runs, and vLLM keeps its old tensors
            self.use_cache(self.cache)

    @property
    def is_stock(self) -> bool:
        """Whether vLLM's own code runs; `torch.compile` traces the value at the model's first call."""
        if self.expert_map is not None:  # vLLM's CPU kernels take no map, and crash on experts of other ranks
            return False
        return self.cache is None and self.gating is None and self.probe is None and self.predictor is None

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        if self.is_stock:
            return super().forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if self.apply_router_weight_on_input:
            # Outside the opaque op, so that torch.compile can fuse it, as in vLLM's own layer (`prepare_finalize/`).
            x = x * topk_weights.to(x.dtype)
        keep_mask = weights = cost = None
        if self.gates_in_model:  # here, so that torch.compile fuses it
            keep_mask, weights, cost = gate_tokens(topk_weights, *self.gate_limits.unbind())
        # Opaque to torch.compile: misses and dropped experts depend on the values of ids and weights.
        return torch.ops.vllm.adapmoe_routed_experts(
            x, topk_weights, topk_ids, keep_mask, weights, cost, self.layer_name
        )

    def run_experts(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, gated: Gated | None = None
    ) -> torch.Tensor:
        """Runs the layer's experts for one step: gates, acquires slots for the kept ones, runs vLLM's kernel on them.

        Args:
            x: `[tokens, hidden]`, already multiplied by its weight under `apply_router_weight_on_input`.
            topk_weights: `[tokens, top_k]`, float32.
            topk_ids: `[tokens, top_k]`, int32, logical expert ids.
            gated: what `forward_modular` has gated, by the rule `token`; None: nothing.

        Returns:
            `[tokens, hidden]`, dtype of `x`. Bit-identical to stock vLLM without a gate and with one wave; otherwise
            (token, expert) pairs are summed in float32, so that a token's output does not depend on its batch.
        """
        context = get_forward_context()
        if self._is_dummy_run(context):
            return self._run_dummy(x, topk_weights, topk_ids)
        assert self.step is not None
        # vLLM marks padding in steps without any, too.
        tokens = x.shape[0]  # a tensor's `len` takes microseconds
        padding = None if tokens == self.step.tokens else padding_rows(context, tokens)
        if self.probe is not None:
            real = None if padding is None else ~padding.cpu()
            topk_weights = self.probe.observe(x, topk_weights, topk_ids.cpu(), real)
        step = self._read_step(x, topk_weights, topk_ids, padding, gated)
        while True:
            try:
                return self._run_step(step)
            except ExpertsUnavailable as error:
                if not self.step.fails_requests:
                    raise
                failed = torch.isin(step.ids, torch.tensor(error.experts, dtype=step.ids.dtype)).any(1)
                self.step.fail(failed, error)
                remaining = step.replace_failed(failed)
                if remaining is None:
                    return torch.zeros_like(x)
                step = remaining

    def _is_dummy_run(self, context: ForwardContext) -> bool:
        """Whether this is profiling, warm-up or graph capture, whose arbitrary ids must not load experts."""
        return not context.attn_metadata or self.step is None or not self.step.running

    def _run_dummy(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return self._run_kernel(x, topk_weights, torch.zeros_like(topk_ids))

    def _read_step(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        padding: torch.Tensor | None,
        gated: Gated | None,
    ) -> StepRouting:
        """Gates a step where possible on the device, and copies its routing to the host in one transfer."""
        gate = self.gating
        product = self._product(x)
        if gate is None and padding is None and ids.device.type == "cpu":
            return StepRouting(x, weights, ids, None, None, product)
        gated = None if gate is None else gate.gate_each(weights, gated)
        on_host = weights if gate is not None and gated is None else None
        keep_mask, cost = (None, None) if gated is None else (gated.keep_mask, gated.cost)
        read = read_together(ids, padding, keep_mask, cost, on_host, product)
        host_ids, padding, keep_mask, cost, on_host, product = read
        assert host_ids is not None
        real = None if padding is None else ~padding
        if gate is not None and on_host is not None:
            batch = gate.gate_together(on_host, host_ids, self._resident_or_loading(), real)
            keep_mask, cost = batch.keep_mask, batch.cost
            weights = batch.weights.to(x.device)
        elif gated is not None:
            weights = gated.weights
        if gate is not None:
            assert keep_mask is not None and cost is not None
            keep_mask = gate.count(keep_mask, cost, real)
        return StepRouting(x, weights, host_ids, real, keep_mask, product)

    def _product(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns the product that later layers are predicted from, if it is to be copied together with the routing."""
        return None

    def _run_step(self, step: StepRouting) -> torch.Tensor:
        prediction = self._predict(step)
        if step.keep_mask is not None:
            return self._run_kept(step, step.keep_mask, prediction)
        experts = distinct(step.ids if step.real is None else step.ids[step.real], self.moe_config.num_experts)
        if len(experts) > self.slots or self.expert_map is not None:
            return self._run_kept(step, step.ungated_mask(), prediction)
        ids = step.ids if step.real is None else step.ids * step.real.unsqueeze(1)
        slots = self._acquire(experts, prediction).numpy().take(ids.numpy())
        if step.real is not None:
            slots = slots.clip(min=0)
        output = self._run_kernel(step.x, step.weights, torch.from_numpy(slots))
        self._release(experts)
        return output

    def _predict(self, step: StepRouting) -> LayerPrediction | None:
        if self.predictor is None:
            return None
        if step.real is None:
            return self.predictor.predict(
                self.cache_layer, step.x, step.weights, step.ids, step.keep_mask, step.product
            )
        rows = slice(int(step.real.sum()))  # padding comes last
        return self.predictor.predict(
            self.cache_layer,
            step.x[rows],
            step.weights[rows],
            step.ids[rows],
            None if step.keep_mask is None else step.keep_mask[rows],
            None if step.product is None else step.product[rows],
        )

    @property
    def slots(self) -> int:
        """Number of experts that this layer can have resident at once."""
        return self.local_num_experts if self.cache is None else self.cache.capacity(self.cache_layer)

    def _resident_or_loading(self) -> torch.Tensor:
        """Returns bool `[local experts]`, on the host: experts that need no fetch."""
        if self.cache is None:
            return torch.ones(self.local_num_experts, dtype=torch.bool)
        return self.cache.resident_or_loading(self.cache_layer)

    def _acquire(
        self, experts: np.ndarray, prediction: LayerPrediction | None, event_experts: np.ndarray = NO_EXPERTS
    ) -> torch.Tensor:
        """Waits until all `experts` are resident; returns `_slot_map()`."""
        acquisition = self._begin(experts, prediction, event_experts)
        if self.cache is not None and acquisition is not None:
            self.cache.wait(acquisition)
        return self._slot_map()

    def _begin(
        self, experts: np.ndarray, prediction: LayerPrediction | None, event_experts: np.ndarray
    ) -> Acquisition | None:
        """Issues the loads of missing `experts`, then prefetches for later layers; None without a cache."""
        acquisition = None
        if self.cache is not None:
            expected = None if prediction is None else prediction.expected
            acquisition = self.cache.begin(self.cache_layer, experts, event_experts, expected)
        if prediction is not None:
            prediction.prefetch()
        return acquisition

    def _arrivals(
        self, experts: np.ndarray, prediction: LayerPrediction | None, event_experts: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yields experts as they become resident (`ExpertCacheManager.arrivals`); all at once without a cache."""
        acquisition = self._begin(experts, prediction, event_experts)
        if self.cache is not None and acquisition is not None:
            yield from self.cache.arrivals(acquisition)
        elif len(experts):
            yield experts

    def _slot_map(self) -> torch.Tensor:
        """Returns int32 `[experts]`, on the host: each expert's row in the parameters, -1 if not resident."""
        if self.cache is not None:
            return self.cache.slot_maps[self.cache_layer]
        if self.expert_map is not None:
            return self.expert_map.cpu()
        return torch.arange(self.local_num_experts, dtype=torch.int32)

    def _release(self, experts: np.ndarray) -> None:
        if self.cache is not None:
            self.cache.release(self.cache_layer, experts)

    def _run_kept(self, step: StepRouting, keep_mask: torch.Tensor, prediction: LayerPrediction | None) -> torch.Tensor:
        """Runs the kept (token, expert) pairs; `keep_mask`: bool `[tokens, top_k]`, on the host.

        CPU kernels accept neither a map nor an absent expert, so each pair becomes a row with one expert, and dropped
        pairs cost no work. Under expert parallelism a rank sums over its own experts, and vLLM adds up the ranks'
        sums, as under tensor parallelism.
        """
        x = step.x
        if self.expert_map is not None:
            keep_mask = keep_mask & (self.expert_map[step.ids.long()] >= 0)
        pairs = kept_pairs(keep_mask, step.ids, step.weights)
        total = torch.zeros(x.shape, dtype=torch.float32)
        for part, outputs in self._run_waves(x, pairs, prediction):
            total.index_add_(0, part.token, outputs.float())
        return total.to(x.dtype)

    def _run_waves(
        self, x: torch.Tensor, pairs: Pairs, prediction: LayerPrediction | None
    ) -> Iterator[tuple[Pairs, torch.Tensor]]:
        """Runs (token, expert) pairs, loading each expert once; yields the pairs of each wave, and their outputs."""
        experts = distinct(torch.from_numpy(pairs.ids), self.moe_config.num_experts)
        groups = waves(experts, self.slots)
        if len(groups) <= 1:  # zero if other ranks have all; the cache still needs the event
            yield pairs, self._run_wave(x, pairs, experts, prediction, NO_EXPERTS)
            return
        wave_of = np.zeros(experts[-1] + 1, dtype=np.int64)
        for number, group in enumerate(groups):
            wave_of[group] = number
        for number, group in enumerate(groups):
            wave = pairs.take(np.flatnonzero(wave_of[pairs.ids] == number))
            yield wave, self._run_wave(x, wave, group, prediction if number == 0 else None, experts)

    def _run_wave(
        self,
        x: torch.Tensor,
        pairs: Pairs,
        experts: np.ndarray,
        prediction: LayerPrediction | None,
        event_experts: np.ndarray,
    ) -> torch.Tensor:
        """Returns outputs `[pairs, hidden]` of pairs whose `experts` can be resident together.

        Pairs with resident experts run while other experts are in flight. The order of arrival does not change the
        result: a pair's output does not depend on the pairs it runs with, and outputs are summed later in fixed order.
        """
        outputs = None
        ready = np.zeros(self.moe_config.num_experts, np.bool_)
        arrived = waiting = 0
        for resident in self._arrivals(experts, prediction, event_experts):
            ready[resident] = True
            arrived += len(resident)
            waiting += len(resident)
            if waiting == len(experts):
                outputs = self._run_pairs(x, pairs)
                continue
            rows = np.flatnonzero(ready[pairs.ids])
            large = len(rows) >= MIN_PAIRS or waiting * self._expert_bytes >= MIN_BYTES
            if arrived < len(experts) and not large:
                continue
            part = self._run_pairs(x, pairs.take(rows))
            if outputs is None:
                outputs = part.new_empty(len(pairs.ids), part.shape[1])
            outputs[torch.from_numpy(rows)] = part
            ready[:] = False
            waiting = 0
        self._release(experts)
        return x.new_empty(0, x.shape[1]) if outputs is None else outputs

    def _run_pairs(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Runs pairs whose experts are resident."""
        slots = torch.from_numpy(self._slot_map().numpy().take(pairs.ids)).unsqueeze(1)
        return self._run_kernel(x[pairs.token], pairs.weights, slots)

    def _run_kernel(self, x: torch.Tensor, topk_weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        if self.apply_router_weight_on_input:  # `forward_modular` has applied it; vLLM would apply it again
            topk_weights = torch.ones_like(topk_weights)
        output = self.quant_method.apply(
            layer=self,
            x=x,
            topk_weights=topk_weights,
            topk_ids=slots,
            shared_experts=None,
            shared_experts_input=None,
        )
        assert isinstance(output, torch.Tensor)
        return output


def padding_rows(context: ForwardContext, tokens: int) -> torch.Tensor | None:
    """Returns bool `[tokens]`, on the device, True for padding; None if vLLM does not mark padding.

    Without VLLM_MOE_SKIP_PADDING, model runner V2 passes a buffer that it does not fill (`prepare_inputs` of
    vllm/v1/worker/gpu/model_runner.py), which still holds values of the last graph capture.
    """
    if context.is_padding is None or not envs.VLLM_MOE_SKIP_PADDING:
        return None
    return context.is_padding[:tokens]


def distinct(ids: torch.Tensor, num_experts: int) -> np.ndarray:
    """Returns the distinct expert ids of a host tensor, ascending, int64."""
    experts = np.empty(num_experts, np.int64)
    return experts[: _distinct(ids.numpy().reshape(-1), experts)]


@compiled
def _distinct(ids: np.ndarray, experts: np.ndarray) -> int:
    """Writes the distinct ids, ascending, to `experts` `[num_experts]`; returns how many they are."""
    used = np.zeros(len(experts), np.bool_)
    for expert in ids:
        if expert < 0:
            raise IndexError("an expert id is negative")
        used[expert] = True
    count = 0
    for expert in range(len(experts)):
        if used[expert]:
            experts[count] = expert
            count += 1
    return count


def kept_pairs(keep_mask: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pairs:
    """Returns the pairs of a step that gating keeps; all arguments `[tokens, top_k]`, on the host."""
    token, experts = np.empty(ids.numel(), np.int64), np.empty(ids.numel(), np.int64)
    kept = np.empty((ids.numel(), 1), np.float32)
    count = _kept_pairs(keep_mask.numpy(), ids.numpy(), weights.numpy(), token, experts, kept)
    return Pairs(torch.from_numpy(token[:count]), torch.from_numpy(kept[:count]), experts[:count])


@compiled
def _kept_pairs(
    keep_mask: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    token: np.ndarray,
    experts: np.ndarray,
    kept: np.ndarray,
) -> int:
    """Writes token, expert and weight of the kept pairs, in order; returns how many they are."""
    count = 0
    for row in range(len(ids)):
        for choice in range(ids.shape[1]):
            if keep_mask[row, choice]:
                token[count] = row
                experts[count] = ids[row, choice]
                kept[count, 0] = weights[row, choice]
                count += 1
    return count


def _routed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    keep_mask: torch.Tensor | None,
    gated_weights: torch.Tensor | None,
    cost: torch.Tensor | None,
    layer_name: str,
) -> torch.Tensor:
    gated = None
    if keep_mask is not None and gated_weights is not None and cost is not None:
        gated = Gated(keep_mask, gated_weights, cost)
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.run_experts(x, topk_weights, topk_ids, gated)


def _routed_experts_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    keep_mask: torch.Tensor | None,
    gated_weights: torch.Tensor | None,
    cost: torch.Tensor | None,
    layer_name: str,
) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="adapmoe_routed_experts", op_func=_routed_experts, fake_impl=_routed_experts_fake)
