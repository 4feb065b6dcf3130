"""Moves a model's experts from the checkpoint into a store while vLLM loads it, then creates the expert cache."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.utils import get_model_architecture

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.tiered_store import TieredStore
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.expert_writes import ExpertWrites
from vllm_adapmoe.integration.layers.precision import ROUNDING, log_rounding
from vllm_adapmoe.integration.loading.built_model import around_weights, check_layers, experts_built
from vllm_adapmoe.integration.loading.identity import load_identity, source_files
from vllm_adapmoe.integration.loading.layer_classes import cached_classes
from vllm_adapmoe.integration.loading.memory import ModelWatch
from vllm_adapmoe.integration.loading.pack_store import (
    cores_of_user,
    log_packing_time,
    open_or_pack,
    pack_folder,
    pack_name,
    store_kind,
    warn_if_replaceable,
)
from vllm_adapmoe.integration.loading.slot_pools import SlotPools, slots_device
from vllm_adapmoe.integration.model_info import check_profile
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.store.base import ExpertStore, StoreError, StoreWriter
from vllm_adapmoe.store.file import FileStore
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import RecordLayout
from vllm_adapmoe.store.shard import StoreShard
from vllm_adapmoe.store.source_files import SourceFiles
from vllm_adapmoe.units import GiB

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
        self.pools = SlotPools(settings, vllm_config, self.layers, self.model)
        self._began = False
        self._store: ExpertStore | None = None
        self._writer: StoreWriter | None = None
        self._sources: SourceFiles | None = None
        self._tier_bytes = 0
        """Bytes of host memory for records of the packed file."""
        self._put: set[int] = set()
        self._progress: tqdm | None = None
        self.building = ExitStack()
        """Contexts in which vLLM builds cached layers; closed once the model is loaded."""

    @cached_property
    def device(self) -> torch.device:
        """Device of the slots, and of the experts of a model that fits."""
        return slots_device()

    @property
    def precision(self) -> int:
        """Bits per expert weight; 16: as in the checkpoint."""
        return self.config.bits

    def add(self, layer: CachedExperts) -> int:
        """Registers a layer under construction; returns its index among the model's MoE layers.

        Raises:
            AdapMoEError: the model's own layer class does more than call kernels, which a cached layer would skip.
        """
        for cls in type(layer).__mro__:
            is_model_class = (
                issubclass(cls, RoutedExperts) and not issubclass(cls, CachedExperts) and cls is not RoutedExperts
            )
            if is_model_class and "forward_modular" in vars(cls):
                raise AdapMoEError(
                    f"{cls.__name__}, vLLM's class for this model's experts, overrides forward_modular, which a cached "
                    "layer would skip; remove moe_method"
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
        return self.pools.all_resident

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
        self.pools.plan()
        experts, expert_bytes = self.pools.num_experts, self.pools.expert_bytes
        if not self.all_resident and any(layer.quant_method.is_monolithic for layer in self.layers):
            method = type(self.layers[0].quant_method).__name__
            raise AdapMoEError(
                f"moe_backend={self.vllm_config.kernel_config.moe_backend}: the kernel of {method} is monolithic: it "
                "routes internally, and the cache cannot see the experts; set --moe-backend marlin or triton"
            )
        if self.all_resident:
            logger.info("Expert cache: all %d experts fit, none is offloaded", experts)
            return
        if self.store_kind == "host":
            self.pools.check_host_room()
            self._writer = HostStore(self.device)
            action = "Loading experts"
        else:
            self._tier_bytes = self.pools.check_tier_room()
            self._sources = source_files(self.vllm_config.model_config, self.vllm_config.load_config)
            path = self.pack_path()
            pack = open_or_pack(self.config, path, self._identity(), self._sources, experts, expert_bytes)
            if get_tensor_model_parallel_rank() == 0:
                warn_if_replaceable(path)
            if isinstance(pack, FileStore):
                self._store = pack
                return
            self._writer = pack
            if get_tensor_model_parallel_rank() == 0:
                log_packing_time(pack)
            if len(pack.packed) < len(self.layers):
                self._sources.start_hashing(cores_of_user())
            action = "Packing experts"
        self._progress = tqdm(
            total=len(self.layers), desc=action, unit="layer", disable=get_tensor_model_parallel_rank() != 0
        )

    def weights_context(self) -> AbstractContextManager:
        """Returns the context in which the model loads weights, with any loader."""
        self.begin()
        return nullcontext() if self.all_resident else ExpertWrites(self.layers, self.is_packed)

    def pack_path(self) -> Path:
        """Returns the path of this rank's packed file, in `store_dir` or in the model's folder in vLLM's cache."""
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        assert self._sources is not None
        return pack_folder(self.config, self._sources) / pack_name(self.config, self._shard(), ranks)

    def _shard(self) -> str:
        """Names this rank's part of the experts: a shard of each, or, under expert parallelism, whole ones."""
        rank = get_tensor_model_parallel_rank()
        if self.layers[0].expert_map is None:
            return str(rank)
        return f"{self.layers[0].expert_placement_strategy}-{rank}"

    def _identity(self) -> dict[str, str]:
        method = self.layers[0].quant_method
        kernel = getattr(method, "experts_cls", None)
        precision = {} if self.precision == 16 else {"precision": str(self.precision), "rounding": str(ROUNDING)}
        return (
            load_identity(self.vllm_config)
            | precision
            | {
                "tensor_parallel_rank": self._shard(),
                "method": type(method).__name__,
                "kernel": kernel.__name__ if kernel is not None else "",
                "layers": str(len(self.layers)),
                "experts": ",".join(str(layer.local_num_experts) for layer in self.layers),
            }
        )

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
                f"store=file does not hold {names[0]}, which {type(layer.quant_method).__name__} computes from all "
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
        """Checks the store's numbers of layers and experts against the model's, in addition to a pack's identity.

        Raises:
            AdapMoEError: they differ.
        """
        counts = [store.num_experts(layer) for layer in range(store.num_layers)]
        if counts != [layer.local_num_experts for layer in self.layers]:
            raise AdapMoEError(f"{self.pack_path()} has other numbers of layers or experts than the model; delete it")

    def finish(self, model: Any) -> ExpertCacheManager | None:
        """Seals the store, creates the cache and connects every layer to it; None if every expert is resident.

        Raises:
            AdapMoEError: the pack would depend on files that are not part of its identity.
            StoreError: the model's files changed while they were loaded, or the pack cannot be written.
        """
        self.begin()
        if self._progress is not None:
            self._progress.close()
        if self._store is None:
            log_rounding(self.layers)
        if self.all_resident:
            return None
        if self._sources is not None:
            if getattr(model, "secondary_weights", None):
                raise AdapMoEError(
                    f"model={self.vllm_config.model_config.model!r} has weights of more than one checkpoint, and a "
                    "pack identifies only one; set store='host'"
                )
            self._sources.check_unchanged()
        store = self._store if self._writer is None else self._writer.seal()
        assert store is not None
        self._check_experts(store)
        self.pools.plan_for(store)
        rank_experts = None
        maps = [layer.expert_map for layer in self.layers]
        if maps[0] is not None:
            records = [expert_map.tolist() for expert_map in maps if expert_map is not None]
            store = StoreShard(store, records)
            rank_experts = [
                [expert for expert, record in enumerate(layer_records) if record >= 0] for layer_records in records
            ]
        if self._tier_bytes:
            store = TieredStore(store, self._tier_bytes, self.device)
            logger.info(
                "Expert cache: %.2f GiB of host memory for %d of %d experts", self._tier_bytes / GiB, store.num_cells,
                self.pools.num_experts,
            )  # fmt: skip
        shape = CacheShape(
            num_experts=[store.num_experts(layer) for layer in range(store.num_layers)],
            top_k=max(layer.top_k for layer in self.layers),
            pool_of=self.pools.pool_of,
            expert_bytes=[layout.nbytes for layout in store.layouts],
            local_experts=rank_experts,
        )
        # Readers on the core that this thread is bound to would compete with the kernels.
        cpus = cores_of_user()
        cache = ExpertCacheManager(
            store, self._controller(shape), self.device, link_gbps=self.config.link_gbps, reader_cpus=cpus
        )
        for layer in self.layers:
            layer.use_cache(cache)
        return cache

    def _controller(self, shape: CacheShape) -> CacheController:
        loads = self.settings.expected_loads
        profile_experts = None if loads is None else [len(curve) - 1 for curve in loads]
        if profile_experts is not None and profile_experts != list(shape.num_experts):
            raise AdapMoEError(
                f"allocation=profile: the profile is for {len(profile_experts)} MoE layers of {set(profile_experts)} "
                f"experts, the model has {len(shape.num_experts)} of {set(shape.num_experts)}; calibrate it anew"
            )
        return CacheController(
            shape, CacheSetup.from_config(self.config, self.pools.slots, loads, self.settings.heads is not None)
        )

    def shrink_slots(self, cache: ExpertCacheManager, nbytes: int) -> int:
        """Shrinks the slots by at least `nbytes` and empties them; returns the bytes freed.

        Raises:
            AdapMoEError: too few slots for one token would be left.
        """
        freed = self.pools.shrink(cache.store, nbytes)
        for layer in self.layers:
            layer.expert_tensors.free()
        cache.resize(self._controller(cache.controller.shape), self.config.link_gbps)
        for layer in self.layers:
            layer.use_cache(cache)
        return freed

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
    try:
        with loading.building as building:
            building.enter_context(cached_classes(loading))
            building.enter_context(loading.model.watching())
            building.enter_context(around_weights(model_class, loading.weights_context))
            yield loading
    except BaseException as error:
        loading.abort(error)
        if isinstance(error, StoreError):  # one line for the user, like every error before serving
            raise AdapMoEError(str(error)) from None
        raise
