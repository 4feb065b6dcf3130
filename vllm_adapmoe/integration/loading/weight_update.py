"""One replacement of a running model's weights: experts go into the store again, and nothing of the old ones stays."""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, SKIP_TENSORS

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.store.base import ExpertStore
from vllm_adapmoe.store.host import HostStore
from vllm_adapmoe.store.shard import StoreShard
from vllm_adapmoe.store.unnamed_pack import UnnamedPack

Weights = Iterable[tuple[str, torch.Tensor]]


class RecordUpdate:
    """Where replaced experts go: over the old ones in host memory, or into a file beside the pack, which stays.

    Args:
        cache: whose store it is.
    """

    def __init__(self, cache: ExpertCacheManager) -> None:
        self.cache = cache
        self._file: UnnamedPack | None = None

    @property
    def records(self) -> ExpertStore:
        """The store as this rank numbers its records."""
        store = self.cache.store
        return store.store if isinstance(store, StoreShard) else store

    def prepare(self) -> None:
        """Sees to it that there is room.

        Raises:
            StoreError: there is none.
        """
        records = self.records
        if self._file is None and not isinstance(records, HostStore):
            counts = [records.num_experts(layer) for layer in range(records.num_layers)]
            self._file = UnnamedPack(records.path.parent, records.layouts, counts)  # type: ignore[attr-defined]

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes all experts of a layer, as `StoreWriter.put_layer` does."""
        writer: Any = self._file or self.records
        writer.put_layer(layer, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})

    def serve(self) -> None:
        """Lets the cache read what has been put."""
        store: ExpertStore = self.cache.store
        if self._file is not None:
            sealed = self._file.seal()
            store = StoreShard(sealed, store.records) if isinstance(store, StoreShard) else sealed
        self.cache.replace_store(store)


class WeightUpdate:
    """From the call that begins to replace a model's weights to its end, in which no step may run.

    vLLM puts every layer's parameters back into the shapes that they were loaded in, loads a layer as soon as all of
    it has come, and copies what comes out over the old tensors (`model_loader/reload/layerwise.py`). Layers whose
    experts are in slots hand theirs to `put` instead, as at the start.

    Args:
        model: vLLM's.
        layers: its MoE layers.
        cache: of their experts; None where every expert is resident.
        records: where they go; None where every expert is resident.
        config: of the model, in which vLLM notes where weights have come from.
        made_up: the engine has started without a checkpoint (`load_format=dummy`).

    Raises:
        AdapMoEError: this model's weights cannot be replaced.
        StoreError: there is no room for them.
    """

    all_resident = False
    """`ExpertLoading.all_resident`: where it is so, layers ask their own loading."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[CachedExperts],
        cache: ExpertCacheManager | None,
        records: RecordUpdate | None,
        config: ModelConfig,
        made_up: bool,
    ) -> None:
        self.model, self.layers, self.cache, self.records = model, layers, cache, records
        own = next((layer for layer in layers if not layer.came_by_loader), None)
        if own is not None and not made_up:
            raise AdapMoEError(
                f"{type(model).__name__} copies weights into {own.layer_name} by itself, past vLLM's reloading; "
                "restart the engine to serve other weights"
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
        self._kept = [(tensor, tensor.clone()) for tensor in _never_on_meta(model)]
        self._put: set[int] = set()
        self._copied = False
        """A tensor in the kernel's format has been copied to its place."""
        self._loaded = False
        """vLLM has done its part."""
        self.claimed: set[str] = set()
        """Parameters that the model says it has loaded."""
        if cache is not None:
            self._stack.enter_context(cache.quiet())
        for layer in layers:
            layer.begin_reload()
            if cache is not None:
                layer.loading = self  # type: ignore[assignment]
                self._stack.callback(delattr, layer, "loading")
                get_layerwise_info(layer).restore_device = torch.device("cpu")

    # What layers ask of their loading

    def is_packed(self, layer: int) -> bool:
        """`ExpertLoading.is_packed`: no pack holds what is coming."""
        return False

    def put(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """`ExpertLoading.put`."""
        assert self.records is not None and self.cache is not None
        missing = self.layers[layer].missing()
        if missing is not None:
            raise AdapMoEError(f"{self.layers[layer].layer_name} has come without {missing}")
        here = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
        there = {piece.name: (piece.dtype, piece.shape) for piece in self.cache.store.layouts[layer].pieces}
        if here != there:
            raise AdapMoEError(f"{self.layers[layer].layer_name} has come in another format: {here} for {there}")
        self._put.add(layer)
        self.records.put(layer, tensors)

    def check_shared(self, layer: Any, names: Any) -> None:
        """`ExpertLoading.check_shared`, which was asked at the start."""

    def noting(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights in the kernel's format, which are copied to their places one by one."""
        for name, tensor in weights:
            yield name, tensor
            self._copied = True

    def check_loaded(self, names: Set[str]) -> None:
        """Checks parameters that the model says it has loaded.

        Raises:
            AdapMoEError: it has copied one by itself; what was copied is lost.
        """
        self.claimed |= names
        modules = dict(self.model.named_modules())
        for name in sorted(names):
            path, _, own = name.rpartition(".")
            module = modules.get(path)
            if module is None or isinstance(module, CachedExperts) or own in SKIP_LOAD_TENSORS:
                continue
            info = get_layerwise_info(module)
            tensor = getattr(module, own, None)
            expected = info.can_load() and isinstance(tensor, torch.Tensor) and tensor.is_meta
            if expected and own not in {loaded for loaded, _ in info.loaded_weights}:
                raise self._copied_by_itself(name)

    def _copied_by_itself(self, name: str) -> AdapMoEError:
        return AdapMoEError(
            f"{type(self.model).__name__} copies {name} by itself, past vLLM's reloading; restart the engine to serve "
            "other weights"
        )

    # The end

    @property
    def began_loading(self) -> bool:
        """Whether vLLM has put the experts' parameters back into the shapes that they are loaded in."""
        return all(get_layerwise_info(layer).can_load() for layer in self.layers)

    def finish(self) -> bool:
        """Serves the new weights; returns whether experts were among them.

        Raises:
            AdapMoEError: some of the experts have not come.
        """
        self._loaded = True
        for prefix, module in self.model.named_modules():
            if not isinstance(module, CachedExperts):
                continue
            missing = module.missing()
            if missing is not None:
                raise AdapMoEError(f"{module.layer_name} has come without {missing}")
            own = {name for name in self.claimed if name.startswith(f"{prefix}.")}
            if own and not module.reloaded:
                raise self._copied_by_itself(min(own))
        came = [layer.reloaded or layer.cache_layer in self._put for layer in self.layers]
        if any(came) and not all(came):
            raise AdapMoEError(f"the experts of {self.layers[came.index(False)].layer_name} have not come")
        self._leave()
        if any(came) and self.records is not None:
            self.records.serve()
        return any(came)

    def abort(self) -> bool:
        """Gives the model its tensors back; returns whether all of them hold the old weights."""
        modules = list(self.model.modules())
        loading = [module for module in modules if get_layerwise_info(module).can_load()]
        as_before = not (self._loaded or self._put or self._copied or any(layer.reloaded for layer in self.layers))
        as_before &= len(loading) in (0, len(modules))
        for module in loading:
            info = get_layerwise_info(module)
            if info.kernel_tensors is not None:
                _place_kernel_tensors(module, info)
            info.reset()
        for tensor, before in self._kept:
            tensor.copy_(before)
        for name, value in self._source.items():
            setattr(self._config, name, value)
        self._leave()
        return as_before

    def _leave(self) -> None:
        self._stack.close()
        for layer in self.layers:
            layer.end_reload()


COPIED = {"sinks", "attention_sink_bias"}
"""Parameters that models copy their weights into without a loader (`gpt_oss.py`, `mimo_v2.py` of vLLM 0.32). VLLM's
reloading takes every other one off its device until its loader has been called, and would lose what is copied."""
SOURCE = ("model", "model_weights", "revision")
"""What vLLM's reloading from a path sets of the model's configuration."""


def _never_on_meta(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that vLLM's reloading writes to at once."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in SKIP_TENSORS:
                yield tensor.data
