"""SlotPools: which MoE layers share a pool of slots, how many slots each pool has, and the memory they take."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.mapped_experts import kernel_of
from vllm_adapmoe.integration.layers.precision import quantised_bytes
from vllm_adapmoe.integration.loading.drafter import estimate_drafter
from vllm_adapmoe.integration.loading.graph_memory import bookkeeping_of_worker, graphs_of_worker
from vllm_adapmoe.integration.loading.host_room import check_host_room, check_tier_room
from vllm_adapmoe.integration.loading.memory import ModelWatch, min_kv_cache, step_bytes, usable_memory
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.planning.slot_budget import (
    DeviceMemory,
    ExpertShape,
    bytes_of,
    choose_slots,
    count_slots,
    slots_without,
    split_layers,
)
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.units import GiB

TENSOR_BYTES = {"MarlinExperts": 32 * GiB}
"""Longest tensor that a kernel can address. Marlin's offset into all experts of a pool, `b_gl_rd`, is 32 bits wide and
counts units of 16 bytes (`csrc/moe/marlin_moe_wna16/marlin_template.h` of vLLM 0.32)."""

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def slots_device() -> torch.device:
    """Returns the device of this worker's slots, with its index: in other threads the current GPU is the first one."""
    kind = current_platform.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


class SlotPools:
    """Plans the pools of one worker: layers whose experts have the same shape share one.

    `plan` decides how many slots there are before any weight is read, by the shapes of the parameters that weights are
    loaded into. `plan_for` decides again by the records of the store, which are in the kernel's format.

    Args:
        settings: the engine's settings of the method.
        vllm_config: resolved by vLLM.
        layers: the model's MoE layers; complete when `plan` is called.
        model: the parameters of the model that is being built.
    """

    def __init__(
        self,
        settings: EngineSettings,
        vllm_config: VllmConfig,
        layers: Sequence[CachedExperts],
        model: ModelWatch,
    ) -> None:
        self.settings = settings
        self.config = settings.config
        self.vllm_config = vllm_config
        self.layers = layers
        self.model = model
        self.slots: list[int] = []
        """Number of slots of each pool."""
        self.groups: list[list[int]] = []
        """Indices of the layers of each pool."""
        self.shapes: list[ExpertShape] = []
        """Shape of the experts of each pool, in their load-time format, or in the one that `precision` makes of it."""
        self.memory: DeviceMemory
        """Memory that this worker may use, and its uses other than slots."""

    @property
    def num_experts(self) -> int:
        """Number of this rank's experts, over all layers."""
        return sum(layer.local_num_experts for layer in self.layers)

    @property
    def all_resident(self) -> bool:
        """Whether there is a slot for every expert."""
        return sum(self.slots) == self.num_experts

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts in their load-time format."""
        return sum(shape.num_experts * shape.bytes_per_expert for shape in self.shapes)

    @property
    def pool_of(self) -> list[int]:
        """Index of each layer's pool."""
        pools = {layer: pool for pool, group in enumerate(self.groups) for layer in group}
        return [pools[layer] for layer in range(len(self.layers))]

    def plan(self) -> None:
        """Groups the layers by shape, and decides the number of slots of each pool.

        Raises:
            AdapMoEError: the budget holds too few slots for one token.
        """
        self.groups = self._layers_by_shape()
        self.shapes = [self._shape(group) for group in self.groups]
        self.slots, self.memory = choose_slots(
            self.config, self.shapes, self._memory(resident=True), self._memory(False)
        )
        slot_bytes = bytes_of(self.shapes, self.slots)
        logger.info(
            "Expert cache: %.2f GiB for slots of %.2f left: %s", slot_bytes / GiB, self.memory.left / GiB, self.memory
        )

    def _layers_by_shape(self) -> list[list[int]]:
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(self.layers):
            shape = tuple(
                (name, tuple(parameter.shape), parameter.dtype) for name, parameter in layer.expert_parameters().items()
            )
            groups.setdefault(shape, []).append(index)
        return list(groups.values())

    def _shape(self, group: Sequence[int]) -> ExpertShape:
        layer = self.layers[group[0]]
        parameters = layer.expert_parameters().values()
        nbytes = sum(p.numel() * p.element_size() for p in parameters) // layer.local_num_experts
        return ExpertShape(
            num_experts=sum(self.layers[index].local_num_experts for index in group),
            bytes_per_expert=quantised_bytes(layer) or nbytes,
            top_k=max(self.layers[index].top_k for index in group),
        )

    def _memory(self, resident: bool) -> DeviceMemory:
        """Returns the memory this worker may use and its uses other than slots; `resident`: every expert has one."""
        weights = self.model.other_weights([p for layer in self.layers for p in layer.expert_parameters().values()])
        other_weights = sum(weight.nbytes for weight in weights)
        kv_cache, kv_cache_of = min_kv_cache(self.vllm_config)
        layer_bytes = max(sum(p.nbytes for p in layer.expert_parameters().values()) for layer in self.layers)
        layer_bytes += other_weights // self.vllm_config.model_config.get_total_num_hidden_layers()
        inner = max(layer.moe_config.intermediate_size_per_partition for layer in self.layers)
        graphs, graphs_of = graphs_of_worker(self.settings, self.vllm_config, self.layers, inner, resident)
        return replace(
            usable_memory(self.config, self.vllm_config),
            in_use=self.model.bytes_in_use(weights),
            other_weights=other_weights,
            draft_model=estimate_drafter(self.vllm_config, layer_bytes),
            activations=step_bytes(self.vllm_config, inner, max(layer.top_k for layer in self.layers)),
            kv_cache=kv_cache,
            kv_cache_of=kv_cache_of,
            graphs=graphs,
            graphs_of=graphs_of,
            bookkeeping=bookkeeping_of_worker(self.settings, self.vllm_config, self.layers, resident),
        )

    def count_drafter(self, nbytes: int) -> None:
        """Counts the draft model as it was built, in place of the estimate: bytes of its weights, and its KV cache."""
        kv_cache, kv_cache_of = min_kv_cache(self.vllm_config)
        self.memory = replace(self.memory, draft_model=nbytes, kv_cache=kv_cache, kv_cache_of=kv_cache_of)

    def check_host_room(self) -> None:
        """Checks that a host store fits into the available host memory (`host_room.check_host_room`).

        Raises:
            AdapMoEError: it does not fit.
        """
        layer_bytes = max(sum(p.nbytes for p in layer.expert_parameters().values()) for layer in self.layers)
        memory = self.memory if current_platform.is_cpu() else None
        ranks = self.vllm_config.parallel_config.local_world_size
        check_host_room(self.shapes, layer_bytes, self.slots, memory, ranks)

    def check_tier_room(self) -> int:
        """Returns the bytes of the host tier, 0 without `host_gb` (`host_room.check_tier_room`).

        Raises:
            AdapMoEError: it does not fit.
        """
        if self.config.host_gb is None:
            return 0
        return check_tier_room(
            self.config.host_gb, self.expert_bytes, self.vllm_config.parallel_config.local_world_size
        )

    def plan_for(self, store: ExpertStore) -> None:
        """Decides the number of slots again, by the records of `store`, and divides pools that are too long.

        Raises:
            AdapMoEError: the budget holds too few slots for one token.
        """
        self.slots = count_slots(self.config, self.shapes_in(store), self.memory)
        if self.split(store):
            self.slots = count_slots(self.config, self.shapes_in(store), self.memory)

    def shapes_in(self, store: ExpertStore) -> list[ExpertShape]:
        """Returns the shapes in the kernel's format: online quantisation halves an expert, padding may enlarge it."""
        return [
            replace(shape, bytes_per_expert=sum(piece.nbytes for piece in store.layouts[group[0]].pieces))
            for shape, group in zip(self.shapes, self.groups, strict=True)
        ]

    def split(self, store: ExpertStore) -> bool:
        """Divides pools with a tensor too long for their kernel; returns whether any was divided."""
        groups, shapes = [], []
        for group, shape, slots in zip(self.groups, self.shapes, self.slots, strict=True):
            limit = TENSOR_BYTES.get(type(kernel_of(self.layers[group[0]])).__name__)
            longest = max(piece.nbytes for piece in store.layouts[group[0]].pieces)
            parts = [group] if limit is None else split_layers(group, slots, longest, limit)
            if len(parts) > 1:
                logger.info(
                    "Expert cache: %d layers have %d pools instead of one, because their kernel addresses at most %.0f "
                    "GiB of a tensor", len(group), len(parts), (limit or 0) / GiB,
                )  # fmt: skip
            for part in parts:
                groups.append(part)
                shapes.append(replace(shape, num_experts=sum(self.layers[index].local_num_experts for index in part)))
        divided = len(groups) > len(self.groups)
        self.groups, self.shapes = groups, shapes
        return divided

    def shrink(self, store: ExpertStore, nbytes: int) -> int:
        """Reduces the numbers of slots by at least `nbytes`; returns the bytes that this frees.

        Raises:
            AdapMoEError: too few slots for one token would be left.
        """
        shapes = self.shapes_in(store)
        slots = slots_without(shapes, self.slots, nbytes)
        if slots is None:
            raise AdapMoEError(
                f"cache_gb=auto: {nbytes / GiB:.3f} of {bytes_of(shapes, self.slots) / GiB:.3f} GiB of slots are "
                f"needed for the KV cache, and too few slots for one token would remain; {self.memory.remedy}"
            )
        freed = bytes_of(shapes, self.slots) - bytes_of(shapes, slots)
        self.slots = slots
        return freed
