"""Cached experts on a GPU: kernels that skip experts absent from a map, and steps that do not wait for the host."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from vllm.forward_context import ForwardContext, get_forward_context

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Chosen
from vllm_adapmoe.gating.rules import Gated
from vllm_adapmoe.integration.layers.cached_experts import NO_EXPERTS, CachedExperts, distinct, padding_rows
from vllm_adapmoe.integration.layers.collaborators import Collaborators, LayerPrediction
from vllm_adapmoe.integration.layers.graph_break import is_capturing
from vllm_adapmoe.integration.layers.slot_kernels import run_on_slots, takes_slots
from vllm_adapmoe.integration.layers.step_routing import StepRouting
from vllm_adapmoe.policy.events import waves


class MappedExperts(CachedExperts):
    """`CachedExperts` on a GPU, where kernels find experts through a map from expert to slot.

    Ids stay expert ids, and every kernel call gets a map from expert to slot row. Experts absent, dropped or in
    another wave have no row; dropped pairs get an id of their own, the number of experts (`slot_kernels`). Slots as ids
    would be simpler, but vLLM sorts pairs for fewer than 1024 experts only, and a pool shared by all layers has more
    slots than that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.deferred: DeferredRouting | None = None
        self.decode: DeviceDecode | None = None
        self._on_slots = False
        """Whether `use_slot_kernel` was called."""
        self._row_of: torch.Tensor | None = None
        """Map from expert to slot row for the running kernel, int32 `[experts + 1]`, on the device; else None."""
        self._whole: tuple[bytes, torch.Tensor] | None = None
        """Cached device map of a fully resident layer, with the bytes of the slot map it was made from."""
        super().__init__(*args, **kwargs)

    def bind(self, collaborators: Collaborators) -> None:
        super().bind(collaborators)
        self.deferred, self.decode = collaborators.deferred, collaborators.decode

    def use_cache(self, cache: ExpertCacheManager) -> None:
        native = self.global_num_experts
        super().use_cache(cache)
        self.global_num_experts = native

    def use_slot_kernel(self) -> None:
        """Makes the kernel that vLLM has chosen work on slots, through a map.

        Raises:
            AdapMoEError: the kernel does not support it.
        """
        kernel = kernel_of(self)
        if not takes_slots(kernel):
            raise AdapMoEError(
                f"moe_backend: vLLM has chosen {type(kernel).__name__}, which does not skip absent experts; "
                "set --moe-backend triton, or marlin for 4-bit weights"
            )
        run_on_slots(kernel, self.local_num_experts)
        self._on_slots = True

    def finish_loading(self) -> None:
        super().finish_loading()
        if self._on_slots:  # replacing weights creates a new kernel
            self.use_slot_kernel()

    @property
    def expert_map(self) -> torch.Tensor | None:
        return super().expert_map if self._row_of is None else self._row_of

    def run_experts(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, gated: Gated | None = None
    ) -> torch.Tensor:
        context = get_forward_context()
        # Not by the mode in the context: model runner V2 captures whole steps with CUDAGraphMode.NONE.
        capturing = is_capturing()
        decode = self.decode
        if decode is not None and (decode.running or capturing or (self._is_dummy_run(context) and decode.owns)):
            if len(x) <= decode.max_tokens:
                return self._run_on_device(decode, x, topk_weights, topk_ids, gated)
            if decode.running:
                raise RuntimeError(f"a step of {len(x)} tokens; the GPU decides in steps of {decode.max_tokens}")
        if capturing:
            raise RuntimeError(
                f"a CUDA graph is captured around {self.layer_name}, whose experts the host fetches during the step; "
                "set cudagraph_mode=PIECEWISE, with vLLM's own splitting_ops"
            )
        if not self._is_dummy_run(context) and self._may_defer(len(x)):
            with self._whole_layer() as whole:
                if whole:
                    return self._run_whole_layer(x, topk_weights, topk_ids, gated, context)
        return super().run_experts(x, topk_weights, topk_ids, gated)

    def _may_defer(self, tokens: int) -> bool:
        tokens_gated_alone = self.gating is None or not self.gating.needs_residency
        return (
            self.deferred is not None
            and self.probe is None
            and (self.predictor is None or not self.predictor.is_tracing)
            and tokens_gated_alone
            and tokens <= self.deferred.tokens
        )

    def _whole_layer(self) -> AbstractContextManager[bool]:
        """Pins the layer if it is fully resident (`ExpertCacheManager.whole_layer`); yields whether it is."""
        return nullcontext(True) if self.cache is None else self.cache.whole_layer(self.cache_layer)

    def _run_on_device(
        self,
        decode: DeviceDecode,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        gated: Gated | None,
    ) -> torch.Tensor:
        """Runs the layer with experts that the GPU itself loads; a CUDA graph can hold all of it."""
        layer, ids = self.cache_layer, topk_ids.contiguous()
        chosen = Chosen(ids)
        if self.gating is not None:
            if self.gating.needs_residency:
                gated = decode.gate_batch(layer, topk_weights.contiguous(), ids)
            else:
                gated = self.gating.gate_each(topk_weights, gated)
            assert gated is not None
            topk_weights = gated.weights
            chosen = Chosen(ids, gated.keep_mask.contiguous(), gated.cost.contiguous())
        predicted = None
        if self.predictor is not None:
            self.predictor.record_on_device(layer, topk_ids, topk_weights)
            predicted = self.predictor.predict_on_device(layer, x)
        row_of, ids = decode.experts(layer, chosen, predicted)
        return self._run_mapped(x, topk_weights, ids, row_of)

    def _run_whole_layer(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        gated: Gated | None,
        context: ForwardContext,
    ) -> torch.Tensor:
        """Runs a fully resident layer without the host, which reads the recorded routing later."""
        if self.predictor is not None and self.cache_layer == 0:
            self.predictor.skip_first_layer()
        assert self.deferred is not None
        weights, ids, cost = topk_weights, topk_ids, None
        if self.gating is not None:
            gated = self.gating.gate_each(topk_weights, gated)
            assert gated is not None
            weights, cost = gated.weights, gated.cost
            ids = ids.masked_fill(~gated.keep_mask, -1)
        padding = padding_rows(context, len(x))
        if padding is not None:
            ids = ids.masked_fill(padding.unsqueeze(1), -1)
        self.deferred.record(self.cache_layer, ids, cost)
        slot_map = self._slot_map()
        slots = slot_map.numpy().tobytes()
        if self._whole is None or self._whole[0] != slots:
            self._whole = slots, self._rows(slot_map, x.device)
        return self._run_mapped(x, weights, ids.masked_fill(ids < 0, self.local_num_experts), self._whole[1])

    def _run_dummy(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Runs the kernels of a step of this size on arbitrary slots, to warm up and to allocate the same memory."""
        num_slots = self.local_num_experts if self.cache is None else self.cache.pool(self.cache_layer).num_slots
        rows = torch.arange(self.local_num_experts, dtype=torch.int32).clamp(max=num_slots - 1)
        topk_ids = topk_ids.masked_fill(topk_ids < 0, self.local_num_experts)  # of padding
        output = self._run_mapped(x, topk_weights, topk_ids, self._rows(rows, x.device))
        if self.slots < self.local_num_experts:  # the sum over waves takes memory in addition to one wave's output
            output = torch.zeros(x.shape, dtype=torch.float32, device=x.device).add_(output).to(x.dtype)
        return output

    def _product(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.predictor is None else self.predictor.product(self.cache_layer, x)

    def _run_step(self, step: StepRouting) -> torch.Tensor:
        if step.real is not None and not step.real.any():
            return torch.zeros_like(step.x)
        prediction = self._predict(step)
        return self._run_kept(step, step.ungated_mask() if step.keep_mask is None else step.keep_mask, prediction)

    def _run_kept(self, step: StepRouting, keep_mask: torch.Tensor, prediction: LayerPrediction | None) -> torch.Tensor:
        """Runs the kept (token, expert) pairs wave by wave, each once all of its experts are resident."""
        x, experts = step.x, distinct(step.ids[keep_mask], self.moe_config.num_experts)
        groups = waves(experts, self.slots)
        if len(groups) == 1:
            return self._run_group(step, keep_mask, experts, prediction, NO_EXPERTS)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, group in enumerate(groups):
            in_group = torch.zeros(self.local_num_experts + 1, dtype=torch.bool)
            in_group.numpy()[group] = True
            kept = keep_mask & in_group[step.ids]
            total += self._run_group(step, kept, group, prediction if number == 0 else None, experts)
        return total.to(x.dtype)

    def _run_group(
        self,
        step: StepRouting,
        keep_mask: torch.Tensor,
        group: np.ndarray,
        prediction: LayerPrediction | None,
        event_experts: np.ndarray,
    ) -> torch.Tensor:
        """Runs the pairs of one group of experts, once all of them are resident."""
        x, slots = step.x, self._acquire(group, prediction, event_experts)
        ids = to_device(torch.where(keep_mask, step.ids, self.local_num_experts), x.device)
        chosen = torch.full_like(slots, -1)
        chosen.numpy()[group] = slots.numpy()[group]
        output = self._run_mapped(x, step.weights, ids, self._rows(chosen, x.device))
        self._release(group)
        return output

    def _rows(self, slots: torch.Tensor, device: torch.device) -> torch.Tensor:
        return to_device(torch.cat((slots, slots.new_full((1,), -1))), device)

    def _run_mapped(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, row_of: torch.Tensor
    ) -> torch.Tensor:
        self._row_of = row_of
        try:
            return self._run_kernel(x, weights, ids)
        finally:
            self._row_of = None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a small host tensor to the device without synchronising with it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def kernel_of(layer: Any) -> Any:
    """Returns the kernel that vLLM chose for a `RoutedExperts` layer, or its quantisation method if that runs them."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return layer.quant_method if kernel is None else kernel.fused_experts
