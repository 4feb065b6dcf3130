"""Moves a model's experts from the checkpoint into a store while vLLM loads it, then creates the expert cache."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.platforms import current_platform

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.expert_writes import ExpertWrites
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts, kernel_of
from vllm_adapmoe.integration.loading.built_model import around_weights, check_layers, experts_built
from vllm_adapmoe.integration.loading.graph_memory import bookkeeping_of_worker, graphs_of_worker
from vllm_adapmoe.integration.loading.host_room import check_host_room
from vllm_adapmoe.integration.loading.identity import load_identity, source_files
from vllm_adapmoe.integration.loading.memory import ModelWatch, least_kv_cache, step_bytes, usable_memory
from vllm_adapmoe.integration.loading.pack_store import (
    cores_of_user,
    open_or_pack,
    pack_folder,
    pack_name,
    say_how_long,
    store_kind,
    warn_of_others,
)
from vllm_adapmoe.integration.model_info import check_profile
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
from vllm_adapmoe.policy.controller import CacheController, CacheSetup
from vllm_adapmoe.store.base import ExpertStore, StoreError, StoreWriter
from vllm_adapmoe.store.file import FileStore
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import RecordLayout
from vllm_adapmoe.store.shard import StoreShard
from vllm_adapmoe.store.source_files import SourceFiles
from vllm_adapmoe.units import GiB

TENSOR_BYTES = {"MarlinExperts": 32 * GiB}
"""Longest tensor that a kernel can address. Marlin's offset into all experts of a pool, `b_gl_rd`, is 32 bits wide and
counts units of 16 bytes (`csrc/moe/marlin_moe_wna16/marlin_template.h` of vLLM 0.32)."""

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


class ExpertLoading:
    """Loads one model's experts into the cache.

    The layers register themselves as vLLM builds them (`add`). At the first weight, `begin` decides how many slots
    there are and whether a valid pack makes reading the experts unnecessary. Each layer then hands over its experts
    (`put`) or only compares formats (`check`), and `finish` creates the cache.
    """

    def __init__(self, settings: EngineSettings, vllm_config: VllmConfig) -> None:
        self.settings = settings
        self.config = settings.config
        self.vllm_config = vllm_config
        self.layers: list[CachedExperts] = []
        self.model = ModelWatch()
        self._began = False
        self._slots: list[int] = []
        self._store: ExpertStore | None = None
        self._writer: StoreWriter | None = None
        self._sources: SourceFiles | None = None
        self._put: set[int] = set()
        self._progress: tqdm | None = None

    @cached_property
    def device(self) -> torch.device:
        """Device of the slots, and of the experts of a model that fits."""
        return slots_device()

    def add(self, layer: CachedExperts) -> int:
        """Registers a layer under construction; returns its index among the model's MoE layers.

        Raises:
            AdapMoEError: the model's own layer class does more than call kernels, which a cached layer would skip.
        """
        for cls in type(layer).__mro__:
            theirs = issubclass(cls, RoutedExperts) and not issubclass(cls, CachedExperts) and cls is not RoutedExperts
            if theirs and "forward_modular" in vars(cls):
                raise AdapMoEError(
                    f"{cls.__name__}, vLLM's class of this model's experts, does not only run them "
                    "(forward_modular); remove moe_method"
                )
        self.layers.append(layer)
        return len(self.layers) - 1

    def is_packed(self, layer: int) -> bool:
        """Returns whether a layer's experts are in a pack already, or in the partial pack of an interrupted start."""
        self.begin()
        if isinstance(self._writer, PackWriter):
            return layer in self._writer.packed and layer not in self._put
        return self._store is not None

    @property
    def all_resident(self) -> bool:
        """Whether there is a slot for every expert: vLLM's own parameters are then used, and nothing is stored."""
        self.begin()
        return sum(self._slots) == sum(layer.local_num_experts for layer in self.layers)

    @property
    def store_kind(self) -> str:
        return store_kind(self.config)

    def begin(self) -> None:
        """Decides, before any weight is read, how many slots there are and whether a valid pack holds the experts.

        Raises:
            AdapMoEError: the layers that vLLM has built cannot be served as configured.
        """
        if self._began:
            return
        self._began = True
        model = self.vllm_config.model_config
        check_layers(self.layers, model.model, model.quantization)
        if self.settings.profiled is not None:
            check_profile(self.settings.profiled, model, experts_built(self.layers))
        shapes = self._loaded_shapes = self._shapes()
        self._slots, memory = choose_slots(self.config, shapes, self._memory(resident=True), self._memory(False))
        self._memory_before = memory
        slot_bytes = bytes_of(shapes, self._slots)
        logger.info("Expert cache: %.2f GiB for slots of %.2f left: %s", slot_bytes / GiB, memory.left / GiB, memory)
        experts = sum(shape.num_experts for shape in shapes)
        if not self.all_resident and any(layer.quant_method.is_monolithic for layer in self.layers):
            method = type(self.layers[0].quant_method).__name__
            raise AdapMoEError(
                f"moe_backend={self.vllm_config.kernel_config.moe_backend}: the kernel of {method} routes by itself, "
                "out of the cache's sight; set --moe-backend marlin or triton"
            )
        if self.all_resident:
            logger.info("Expert cache: all %d experts fit, none is offloaded", experts)
            return
        expert_bytes = self.expert_bytes
        if self.store_kind == "host":
            self._check_host_room()
            self._writer = HostStore(self.device)
            action = "Loading experts"
        else:
            self._sources = source_files(self.vllm_config.model_config, self.vllm_config.load_config)
            path = self.pack_path()
            found = open_or_pack(self.config, path, self._identity(), self._sources, experts, expert_bytes)
            if get_tensor_model_parallel_rank() == 0:
                warn_of_others(path)
            if isinstance(found, FileStore):
                self._store = found
                return
            self._writer = found
            if get_tensor_model_parallel_rank() == 0:
                say_how_long(found)
            if len(found.packed) < len(self.layers):
                self._sources.start_hashing(cores_of_user())
            action = "Packing experts"
        self._progress = tqdm(
            total=len(self.layers), desc=action, unit="layer", disable=get_tensor_model_parallel_rank() != 0
        )

    def taking_weights(self) -> AbstractContextManager:
        """Returns the context in which the model loads its weights, whatever its loader."""
        self.begin()
        return nullcontext() if self.all_resident else ExpertWrites(self.layers, self.is_packed)

    def _layers_by_shape(self) -> list[list[int]]:
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(self.layers):
            shape = tuple(
                (name, tuple(parameter.shape), parameter.dtype) for name, parameter in layer.expert_parameters().items()
            )
            groups.setdefault(shape, []).append(index)
        return list(groups.values())

    def _shapes(self) -> list[ExpertShape]:
        self._groups = self._layers_by_shape()
        shapes = []
        for group in self._groups:
            layer = self.layers[group[0]]
            parameters = layer.expert_parameters().values()
            shapes.append(
                ExpertShape(
                    num_experts=sum(self.layers[index].local_num_experts for index in group),
                    bytes_per_expert=sum(p.numel() * p.element_size() for p in parameters) // layer.local_num_experts,
                    top_k=max(self.layers[index].top_k for index in group),
                )
            )
        return shapes

    def _shapes_in(self, store: ExpertStore) -> list[ExpertShape]:
        """Returns the shapes in the kernel's format: online quantisation halves an expert, padding may enlarge it."""
        return [
            replace(shape, bytes_per_expert=sum(piece.nbytes for piece in store.layouts[group[0]].pieces))
            for shape, group in zip(self._loaded_shapes, self._groups, strict=True)
        ]

    def _split_pools(self, store: ExpertStore) -> bool:
        """Divides pools with a tensor too long for their kernel; returns whether any was divided."""
        groups, shapes = [], []
        for group, shape, slots in zip(self._groups, self._loaded_shapes, self._slots, strict=True):
            limit = TENSOR_BYTES.get(type(kernel_of(self.layers[group[0]])).__name__)
            longest = max(piece.nbytes for piece in store.layouts[group[0]].pieces)
            parts = [group] if limit is None else split_layers(group, slots, longest, limit)
            if len(parts) > 1:
                logger.info(
                    "Expert cache: %d layers have %d pools instead of one, for their kernel reads %.0f GiB of a tensor "
                    "at most", len(group), len(parts), (limit or 0) / GiB,
                )  # fmt: skip
            for part in parts:
                groups.append(part)
                shapes.append(replace(shape, num_experts=sum(self.layers[index].local_num_experts for index in part)))
        divided = len(groups) > len(self._groups)
        self._groups, self._loaded_shapes = groups, shapes
        return divided

    def _memory(self, resident: bool) -> DeviceMemory:
        """Returns the memory this worker may use and its uses other than slots; `resident`: every expert has one."""
        weights = self.model.other_weights([p for layer in self.layers for p in layer.expert_parameters().values()])
        kv_cache, kv_cache_of = least_kv_cache(self.vllm_config)
        inner = max(layer.moe_config.intermediate_size_per_partition for layer in self.layers)
        graphs, graphs_of = graphs_of_worker(self.settings, self.vllm_config, self.layers, inner, resident)
        return replace(
            usable_memory(self.config, self.vllm_config),
            in_use=self.model.bytes_in_use(weights),
            other_weights=sum(weight.nbytes for weight in weights),
            activations=step_bytes(self.vllm_config, inner, max(layer.top_k for layer in self.layers)),
            kv_cache=kv_cache,
            kv_cache_of=kv_cache_of,
            graphs=graphs,
            graphs_of=graphs_of,
            bookkeeping=bookkeeping_of_worker(self.settings, self.vllm_config, self.layers, resident),
        )

    def _check_host_room(self) -> None:
        layer_bytes = max(sum(p.nbytes for p in layer.expert_parameters().values()) for layer in self.layers)
        others = self._memory_before if current_platform.is_cpu() else None
        ranks = self.vllm_config.parallel_config.local_world_size
        check_host_room(self._loaded_shapes, layer_bytes, self._slots, others, ranks)

    def pack_path(self) -> Path:
        """Returns the path of this rank's packed file, in `store_dir` or in the model's folder in vLLM's cache."""
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        assert self._sources is not None
        return pack_folder(self.config, self._sources) / pack_name(self._shard(), ranks)

    def _shard(self) -> str:
        """Names this rank's part of the experts: a shard of each, or, under expert parallelism, whole ones."""
        rank = get_tensor_model_parallel_rank()
        if self.layers[0].expert_map is None:
            return str(rank)
        return f"{self.layers[0].expert_placement_strategy}-{rank}"

    def _identity(self) -> dict[str, str]:
        method = self.layers[0].quant_method
        kernel = getattr(method, "experts_cls", None)
        return load_identity(self.vllm_config) | {
            "tensor_parallel_rank": self._shard(),
            "method": type(method).__name__,
            "kernel": kernel.__name__ if kernel is not None else "",
            "layers": str(len(self.layers)),
            "experts": ",".join(str(layer.local_num_experts) for layer in self.layers),
        }

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores the experts of a layer: one tensor `[experts, ...]` in kernel format per parameter."""
        assert self._writer is not None
        self._put.add(layer)
        self._writer.put_layer(layer, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        if self._progress is not None:
            self._progress.update()

    def check_shared(self, layer: RoutedExperts, names: Sequence[str]) -> None:
        """Refuses parameters that a layer's experts share, which a pack of experts could not restore.

        Raises:
            AdapMoEError: there are some, with `store=file`.
        """
        if names and self.store_kind == "file":
            raise AdapMoEError(
                f"store=file does not hold {names[0]}, which {type(layer.quant_method).__name__} makes from all "
                "experts of a layer; set store='host'"
            )

    def record_names(self, layer: int) -> list[str]:
        """Returns the names of the pieces of each expert of a layer in the pack."""
        return [piece.name for piece in self._packed_layout(layer).pieces]

    def _packed_layout(self, layer: int) -> RecordLayout:
        if isinstance(self._writer, PackWriter):
            return self._writer.layout(layer)
        assert self._store is not None
        return self._store.layouts[layer]

    def check(self, layer: int, blank: Mapping[str, torch.Tensor]) -> None:
        """Compares the kernel format of one expert with that of the pack.

        Raises:
            AdapMoEError: they differ, which should never happen for a pack of the same identity.
        """
        if RecordLayout.of(blank) != self._packed_layout(layer):
            raise AdapMoEError(f"{self.pack_path()} holds experts in another kernel format; delete it and start again")
        if self._progress is not None:
            self._progress.update()

    def _check_experts(self, store: ExpertStore) -> None:
        """Checks the store's numbers of layers and experts against the model's, whatever a pack's identity says.

        Raises:
            AdapMoEError: they differ.
        """
        theirs = [store.num_experts(layer) for layer in range(store.num_layers)]
        if theirs != [layer.local_num_experts for layer in self.layers]:
            raise AdapMoEError(f"{self.pack_path()} holds other layers or experts than the model; delete it")

    def finish(self, model: Any) -> ExpertCacheManager | None:
        """Seals the store, creates the cache and connects every layer to it; None if every expert is resident.

        Raises:
            AdapMoEError: the pack would depend on files that are not part of its identity.
            StoreError: the model's files changed while they were loaded, or the pack cannot be written.
        """
        self.begin()
        if self._progress is not None:
            self._progress.close()
        if self.all_resident:
            return None
        if self._sources is not None:
            if getattr(model, "secondary_weights", None):
                raise AdapMoEError(
                    f"model={self.vllm_config.model_config.model!r} has weights of more than one checkpoint, which a "
                    "pack cannot be held to; set store='host'"
                )
            self._sources.check_unchanged()
        store = self._store if self._writer is None else self._writer.seal()
        assert store is not None
        self._check_experts(store)
        self._slots = count_slots(self.config, self._shapes_in(store), self._memory_before)
        if self._split_pools(store):
            self._slots = count_slots(self.config, self._shapes_in(store), self._memory_before)
        held = None
        maps = [layer.expert_map for layer in self.layers]
        if maps[0] is not None:
            records = [expert_map.tolist() for expert_map in maps if expert_map is not None]
            store = StoreShard(store, records)
            held = [[expert for expert, record in enumerate(of_layer) if record >= 0] for of_layer in records]
        pool_of = [0] * len(self.layers)
        for pool, group in enumerate(self._groups):
            for index in group:
                pool_of[index] = pool
        shape = CacheShape(
            num_experts=[store.num_experts(layer) for layer in range(store.num_layers)],
            top_k=max(layer.top_k for layer in self.layers),
            pool_of=pool_of,
            expert_bytes=[layout.nbytes for layout in store.layouts],
            local_experts=held,
        )
        # On the core that this thread is bound to, readers would compete with the kernels.
        cpus = cores_of_user()
        cache = ExpertCacheManager(
            store, self._controller(shape), self.device, link_gbps=self.config.link_gbps, reader_cpus=cpus
        )
        for layer in self.layers:
            layer.use_cache(cache)
        return cache

    def _controller(self, shape: CacheShape) -> CacheController:
        loads = self.settings.expected_loads
        of_profile = None if loads is None else [len(curve) - 1 for curve in loads]
        if of_profile is not None and of_profile != list(shape.num_experts):
            raise AdapMoEError(
                f"allocation=profile: the profile is of {len(of_profile)} MoE layers of {set(of_profile)} experts, the "
                f"model has {len(shape.num_experts)} of {set(shape.num_experts)}; calibrate it anew"
            )
        return CacheController(
            shape, CacheSetup.from_config(self.config, self._slots, loads, self.settings.heads is not None)
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts in their load-time format."""
        return sum(shape.num_experts * shape.bytes_per_expert for shape in self._loaded_shapes)

    @property
    def remedy(self) -> str:
        """Advice that frees memory, for error messages."""
        return self._memory_before.remedy

    def give_back(self, cache: ExpertCacheManager, nbytes: int) -> int:
        """Shrinks the slots by at least `nbytes` and empties them; returns the bytes freed.

        Raises:
            AdapMoEError: too few slots for one token would be left.
        """
        shapes = self._shapes_in(cache.store)
        slots = slots_without(shapes, self._slots, nbytes)
        if slots is None:
            raise AdapMoEError(
                f"cache_gb=auto: {nbytes / GiB:.3f} of {bytes_of(shapes, self._slots) / GiB:.3f} GiB of slots would "
                f"have to go to the KV cache, and one token needs more than is left; {self.remedy}"
            )
        taken = bytes_of(shapes, self._slots) - bytes_of(shapes, slots)
        self._slots = slots
        for layer in self.layers:
            layer.expert_tensors.free()
        cache.resize(self._controller(cache.controller.shape), self.config.link_gbps)
        for layer in self.layers:
            layer.use_cache(cache)
        return taken

    def abort(self, error: BaseException) -> None:
        """Removes a half-written pack after an `Exception`; after a signal to end, the next start continues it."""
        if self._sources is not None:
            self._sources.stop_hashing()
        if self._writer is not None and isinstance(error, Exception):
            self._writer.abort()


@contextmanager
def expert_loading(settings: EngineSettings, vllm_config: VllmConfig) -> Iterator[ExpertLoading]:
    """Builds models with cached experts inside the context.

    The layer classes are registered for this one model and removed afterwards, so that another engine in the same
    process, without the method, gets vLLM's own.
    """
    # Imports the model, so that its own expert classes are known.
    model_class, _ = get_model_architecture(vllm_config.model_config)
    loading = ExpertLoading(settings, vllm_config)
    names = []
    base = experts_base()
    for cls in _expert_classes(RoutedExperts):
        cached = type(f"Cached{cls.__name__}", (base, cls), {"loading": loading})
        PluggableLayer.register_oot(cached, name=cls.__name__)
        names.append(cls.__name__)
    try:
        with loading.model.watching(), around_weights(model_class, loading.taking_weights):
            yield loading
    except BaseException as error:
        loading.abort(error)
        if isinstance(error, StoreError):  # one line for the user, like every error before serving
            raise AdapMoEError(str(error)) from None
        raise
    finally:
        for name in names:
            del op_registry_oot[name]


def slots_device() -> torch.device:
    """Returns the device of this worker's slots, with its index: in other threads the current GPU is the first one."""
    kind = current_platform.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def experts_base() -> type[CachedExperts]:
    """Returns the layer class that holds and runs experts on this platform."""
    return CachedExperts if current_platform.is_cpu() else MappedExperts


def _expert_classes(cls: type[RoutedExperts]) -> list[type[RoutedExperts]]:
    classes = [cls]
    for subclass in cls.__subclasses__():
        if not issubclass(subclass, CachedExperts):
            classes += _expert_classes(subclass)
    return classes
