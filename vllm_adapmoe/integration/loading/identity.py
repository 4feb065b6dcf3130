"""Identifies a model by the files that vLLM loads, local or downloaded, and by how it loads them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from vllm import __version__ as vllm_version
from vllm import envs
from vllm.config import LoadConfig, VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader
from vllm.transformers_utils.repo_utils import try_get_local_file
from vllm.transformers_utils.runai_utils import is_runai_obj_uri

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.printable import reason
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file_hash import HashCache
from vllm_adapmoe.store.source_files import SourceFiles

SETTINGS = (
    "config.json", "params.json",
    "hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json",
)  # fmt: skip
"""Files that describe a model and its quantisation, by the names that vLLM 0.30 to 0.33 reads."""


class Model(Protocol):
    """The fields of vLLM's `ModelConfig` that locate a model."""

    model: Any
    revision: Any
    model_weights: Any
    hf_config_path: Any


@dataclass
class Folder:
    """A model in a folder, for use without a `ModelConfig`."""

    model: Any
    revision: Any = None
    model_weights: Any = ""
    hf_config_path: Any = None


def source_files(model: Model, load: LoadConfig, download: bool = True) -> SourceFiles:
    """Returns the files of a model in their current state.

    Args:
        model: the model as given to vLLM.
        load: how vLLM loads it.
        download: whether to download weights that are not on this machine yet, as vLLM would.

    Raises:
        AdapMoEError: vLLM finds no weights, or their bytes cannot be identified.
    """
    loader = check_identifiable(model, load)
    folder, files = _weight_files(model, load, loader, download)
    paths = {os.path.relpath(file, folder): file for file in files}
    for name in SETTINGS:
        path = _settings_file(name, model, folder)
        if path is not None:
            paths[name] = path
    try:
        return SourceFiles(str(folder), paths, HashCache(Path(envs.VLLM_CACHE_ROOT) / "adapmoe" / "hashes"))
    except StoreError as error:
        raise AdapMoEError(f"model={model.model!r}: {error}") from None


def check_identifiable(model: Model, load: LoadConfig) -> type[BaseModelLoader]:
    """Checks that the bytes of the weights can be identified on this machine; returns the class of vLLM's loader.

    Raises:
        AdapMoEError: they are in object storage, or their load format reads files that are not known here.
    """
    weights = model.model_weights or model.model
    if is_runai_obj_uri(weights):
        raise AdapMoEError(
            f"model={weights!r} is in object storage, where a change can only be detected by reading every byte; "
            "set store='host' and no profile, or download it and pass the folder"
        )
    loader = type(get_model_loader(load))
    # npcache loads its own converted copies of the weights.
    if loader not in (DummyModelLoader, RunaiModelStreamerLoader, DefaultModelLoader) or load.load_format == "npcache":
        raise AdapMoEError(
            f"load_format={load.load_format!r} reads files that cannot be identified; set load_format='auto', or "
            "store='host' and no profile"
        )
    return loader


def weight_files(model: Model, load: LoadConfig) -> list[Path]:
    """Returns the weight files that vLLM's loader would read, sorted; those of a hub's model are downloaded.

    Raises:
        AdapMoEError: as in `source_files`.
    """
    return _weight_files(model, load, check_identifiable(model, load), download=True)[1]


def _weight_files(
    model: Model, load: LoadConfig, loader: type[BaseModelLoader], download: bool
) -> tuple[Path, list[Path]]:
    """Returns the model's folder, and the files that vLLM's own loader would read, sorted."""
    name = model.model
    if loader is DummyModelLoader:
        return Path(os.path.abspath(name)), []
    try:
        if not download and not envs.VLLM_USE_MODELSCOPE and not Path(name).is_dir():
            name = snapshot_download(name, revision=model.revision, cache_dir=load.download_dir, local_files_only=True)
        if loader is RunaiModelStreamerLoader:
            files = RunaiModelStreamerLoader(load)._prepare_weights(model.model_weights or name, model.revision)
            folder = os.path.commonpath([os.path.dirname(file) for file in files])
        else:
            folder, files, *_ = DefaultModelLoader(load)._prepare_weights(name, None, model.revision, True, None)
    except Exception as error:  # from vLLM, huggingface_hub, ModelScope or the network
        raise AdapMoEError(
            f"model={model.model!r}: vLLM finds no weights of it ({reason(error)}); download it first, or pass its "
            "folder"
        ) from None
    # Links are not resolved: a hub's snapshots and a user's `latest` keep their names.
    return Path(os.path.abspath(folder)), sorted(Path(os.path.abspath(file)) for file in files)


def _settings_file(name: str, model: Model, folder: Path) -> Path | None:
    """Finds a settings file next to the weights, or where vLLM has downloaded it (elsewhere with `download_dir`)."""
    described = model.hf_config_path or model.model
    for place in (Path(described), folder):
        if (place / name).is_file():
            return place / name
    path = try_get_local_file(described, name, revision=model.revision or "main")
    return path if isinstance(path, Path) and path.is_file() else None


def model_hash(model: Model, load: LoadConfig) -> str:
    """Returns the hash over every byte of a model's files, as stored in a profile.

    Raises:
        AdapMoEError: as in `source_files`, or a file cannot be read.
    """
    try:
        return source_files(model, load).model_hash()
    except StoreError as error:
        raise AdapMoEError(f"model={model.model!r}: {error}") from None


def checkpoint_hash(folder: Path) -> str:
    """Returns the hash of the checkpoint that vLLM would load from a folder by default.

    Raises:
        AdapMoEError: as in `model_hash`.
    """
    return model_hash(Folder(str(folder)), LoadConfig())


def load_identity(vllm_config: VllmConfig) -> dict[str, str]:
    """Returns the part of a pack's identity that is known before any layer is built."""
    model, load, parallel = vllm_config.model_config, vllm_config.load_config, vllm_config.parallel_config
    return {
        "kind of weights": "random" if load.load_format == "dummy" else "a checkpoint's",
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "vllm": vllm_version,
        "tensor_parallel_size": str(parallel.tensor_parallel_size),
    }
