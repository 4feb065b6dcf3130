"""Replaces the weights of a running model: writes the new experts into the store, and empties the slots."""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, SKIP_TENSORS

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.tiered_store import TieredStore
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.shard import StoreShard
from vllm_adapmoe.store.unnamed_pack import UnnamedPack

Weights = Iterable[tuple[str, torch.Tensor]]


class RecordUpdate:
    """Writes new experts over the old ones in host memory, or into an unnamed file beside the pack, which is kept.

    Args:
        cache: the cache whose store is updated.
    """

    def __init__(self, cache: ExpertCacheManager) -> None:
        self.cache = cache
        self._file: UnnamedPack | None = None

    @property
    def records(self) -> ExpertStore:
        """The store with this rank's numbering of records, behind the host tier."""
        store = self.cache.store
        while isinstance(store, StoreShard | TieredStore):
            store = store.store
        return store

    def prepare(self) -> None:
        """Reserves room for the new experts.

        Raises:
            StoreError: there is not enough room.
        """
        records = self.records
        if self._file is None and not isinstance(records, HostStore):
            counts = [records.num_experts(layer) for layer in range(records.num_layers)]
            self._file = UnnamedPack(records.path.parent, records.layouts, counts)  # type: ignore[attr-defined]

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores all experts of a layer, like `StoreWriter.put_layer`."""
        writer: Any = self._file or self.records
        writer.put_layer(layer, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})

    def serve(self) -> None:
        """Makes the cache read the new experts."""
        store: ExpertStore = self.cache.store
        if self._file is not None:
            sealed = self._file.seal()
            store = StoreShard(sealed, store.records) if isinstance(store, StoreShard) else sealed
        self.cache.replace_store(store)


class WeightUpdate:
    """One weight update, from the call that begins it to the one that ends it; no step may run meanwhile.

    vLLM restores the load-time shapes of every layer's parameters, processes a layer as soon as it is complete, and
    copies the result over the old tensors (`model_loader/reload/layerwise.py`). Layers whose experts are in slots hand
    theirs to `put` instead, as at the start.

    Args:
        model: vLLM's model.
        layers: the MoE layers of `model`.
        cache: the cache of their experts; None if every expert is resident.
        records: where new experts are written; None if every expert is resident.
        config: the model's configuration, in which vLLM records the source of the weights.
        dummy_weights: whether the engine was started without a checkpoint (`load_format=dummy`).

    Raises:
        AdapMoEError: this model's weights cannot be replaced.
        StoreError: there is no room for the new experts.
    """

    all_resident = False
    """Stands for `ExpertLoading.all_resident`; False because fully resident layers keep their own loading."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[CachedExperts],
        cache: ExpertCacheManager | None,
        records: RecordUpdate | None,
        config: ModelConfig,
        dummy_weights: bool,
    ) -> None:
        self.model, self.layers, self.cache, self.records = model, layers, cache, records
        bypassed = next((layer for layer in layers if not layer.loaded_by_weight_loader), None)
        if bypassed is not None and not dummy_weights:
            raise AdapMoEError(
                f"{type(model).__name__} copies weights into {bypassed.layer_name} in its own code, which bypasses "
                "vLLM's reloading; restart the engine to serve other weights"
            )
        if records is not None:
            records.prepare()
        self._stack = ExitStack()
        for names in (SKIP_TENSORS, SKIP_LOAD_TENSORS):
            added = COPIED - names
            names |= added
            self._stack.callback(names.difference_update, added)
        self.device = layers[0].loading.device
        self._config = config
        self._source = {name: getattr(self._config, name) for name in SOURCE if hasattr(self._config, name)}
        self._saved_tensors = [(tensor, tensor.clone()) for tensor in _never_on_meta(model)]
        self._put: set[int] = set()
        self._copied = False
        """Whether a tensor in the kernel's format has been copied over an old one."""
        self._loaded = False
        """Whether vLLM has loaded and processed all weights of the update."""
        self._modules = dict(model.named_modules())
        self.reported_names: set[str] = set()
        """Names of the parameters that the model reports as loaded."""
        if cache is not None:
            self._stack.enter_context(cache.quiet())
        for layer in layers:
            layer.begin_reload()
            if cache is not None:
                layer.loading = self  # type: ignore[assignment]
                self._stack.callback(delattr, layer, "loading")
                get_layerwise_info(layer).restore_device = torch.device("cpu")

    # Interface of `ExpertLoading` that layers use

    def is_packed(self, layer: int) -> bool:
        """Returns False, as no pack holds the new weights (see `ExpertLoading.is_packed`)."""
        return False

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores the new experts of a layer, like `ExpertLoading.put`.

        Raises:
            AdapMoEError: some weights of the layer are missing, or have another format.
        """
        assert self.records is not None and self.cache is not None
        missing = self.layers[layer].missing_weight()
        if missing is not None:
            raise AdapMoEError(
                f"{self.layers[layer].layer_name}: {missing} was not received; send every weight of a layer"
            )
        actual = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
        expected = {piece.name: (piece.dtype, piece.shape) for piece in self.cache.store.layouts[layer].pieces}
        if actual != expected:
            raise AdapMoEError(
                f"{self.layers[layer].layer_name}: the new experts have the format {actual}, the cache has {expected}; "
                "send weights of the checkpoint's format"
            )
        self._put.add(layer)
        self.records.put(layer, tensors)

    def check_shared(self, layer: Any, names: Any) -> None:
        """Does nothing: `ExpertLoading.check_shared` has checked the same parameters at the start."""

    def watch_copies(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields weights in the kernel's format, and records that vLLM has begun to copy them over the old ones."""
        for name, tensor in weights:
            yield name, tensor
            self._copied = True

    def check_loaded(self, names: Set[str]) -> None:
        """Checks parameters that the model reports as loaded.

        Raises:
            AdapMoEError: the model copied one in its own code, bypassing vLLM's reloading, which loses the copy.
        """
        self.reported_names |= names
        for name in sorted(names):
            path, _, parameter = name.rpartition(".")
            module = self._modules.get(path)
            if module is None or isinstance(module, CachedExperts) or parameter in SKIP_LOAD_TENSORS:
                continue
            info = get_layerwise_info(module)
            tensor = getattr(module, parameter, None)
            expected = info.can_load() and isinstance(tensor, torch.Tensor) and tensor.is_meta
            if expected and parameter not in {loaded for loaded, _ in info.loaded_weights}:
                raise self._bypassed_reloading(name)

    def _bypassed_reloading(self, name: str) -> AdapMoEError:
        return AdapMoEError(
            f"{type(self.model).__name__} copies {name} in its own code, which bypasses vLLM's reloading; restart the "
            "engine to serve other weights"
        )

    # Ending the update

    @property
    def began_loading(self) -> bool:
        """Whether vLLM has restored the load-time shapes of the experts' parameters."""
        return all(get_layerwise_info(layer).can_load() for layer in self.layers)

    def finish(self) -> bool:
        """Starts to serve the new weights; returns whether they included experts.

        Raises:
            AdapMoEError: some experts were not received.
        """
        self._loaded = True
        for prefix, module in self.model.named_modules():
            if not isinstance(module, CachedExperts):
                continue
            missing = module.missing_weight()
            if missing is not None:
                raise AdapMoEError(f"{module.layer_name}: {missing} was not received; send every weight of a layer")
            reported = {name for name in self.reported_names if name.startswith(f"{prefix}.")}
            if reported and not module.reloaded:
                raise self._bypassed_reloading(min(reported))
        received = [layer.reloaded or layer.cache_layer in self._put for layer in self.layers]
        if any(received) and not all(received):
            raise AdapMoEError(
                f"the experts of {self.layers[received.index(False)].layer_name} were not received, those of other "
                "layers were; send all layers or none"
            )
        self._close()
        if any(received) and self.records is not None:
            self.records.serve()
        return any(received)

    def abort(self) -> bool:
        """Restores the model's tensors; returns whether all of them hold the old weights."""
        modules = list(self.model.modules())
        loading = [module for module in modules if get_layerwise_info(module).can_load()]
        as_before = not (self._loaded or self._put or self._copied or any(layer.reloaded for layer in self.layers))
        as_before &= len(loading) in (0, len(modules))
        for module in loading:
            info = get_layerwise_info(module)
            if info.kernel_tensors is not None:
                _place_kernel_tensors(module, info)
            info.reset()
        for tensor, before in self._saved_tensors:
            tensor.copy_(before)
        for name, value in self._source.items():
            setattr(self._config, name, value)
        self._close()
        return as_before

    def _close(self) -> None:
        self._stack.close()
        for layer in self.layers:
            layer.end_reload()


COPIED = {"sinks", "attention_sink_bias"}
"""Parameters that models copy weights into without a loader (`gpt_oss.py`, `mimo_v2.py` of vLLM 0.32). vLLM's reloading
moves all other parameters to meta until their loaders are called, and would lose such copies."""
SOURCE = ("model", "model_weights", "revision")
"""Fields of the model's configuration that vLLM sets when reloading from a path."""


def _never_on_meta(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields tensors that vLLM's reloading never moves to the meta device, and so overwrites immediately."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in SKIP_TENSORS:
                yield tensor.data
