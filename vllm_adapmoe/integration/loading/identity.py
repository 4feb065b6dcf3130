"""What a model is: the files that vLLM loads it from, however it gets them, and how it is loaded."""

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
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file_hash import HashCache
from vllm_adapmoe.store.source_files import SourceFiles

SETTINGS = (
    "config.json", "params.json",
    "hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json",
)  # fmt: skip
"""Files that say what a model is, and how it is quantised: by the names that vLLM 0.30 to 0.33 reads them under."""


class Model(Protocol):
    """What of vLLM's `ModelConfig` says where a model is."""

    model: Any
    revision: Any
    model_weights: Any
    hf_config_path: Any


@dataclass
class Folder:
    """The model in a folder, where there is no `ModelConfig`."""

    model: Any
    revision: Any = None
    model_weights: Any = ""
    hf_config_path: Any = None


def source_files(model: Model, load: LoadConfig, download: bool = True) -> SourceFiles:
    """The files of a model as they are now.

    Args:
        model: as vLLM was asked for it.
        load: how vLLM gets it.
        download: weights that are not on this machine yet, as vLLM is about to.

    Raises:
        AdapMoEError: vLLM finds no weights, or its bytes cannot be known.
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
    """Refuses weights whose bytes nothing on this machine tells; returns the class of vLLM's loader.

    Raises:
        AdapMoEError: they are in object storage, or loaded in a way whose files are not known here.
    """
    weights = model.model_weights or model.model
    if is_runai_obj_uri(weights):
        raise AdapMoEError(
            f"model={weights!r} is in object storage, where only reading it all tells whether it has changed; "
            "set store='host' and no profile, or download it and name the folder"
        )
    loader = type(get_model_loader(load))
    # npcache loads copies of the weights that it makes itself.
    if loader not in (DummyModelLoader, RunaiModelStreamerLoader, DefaultModelLoader) or load.load_format == "npcache":
        raise AdapMoEError(
            f"load_format={load.load_format!r} is not one whose files are known here; set load_format='auto', or "
            "store='host' and no profile"
        )
    return loader


def _weight_files(
    model: Model, load: LoadConfig, loader: type[BaseModelLoader], download: bool
) -> tuple[Path, list[Path]]:
    """The model's folder, and the files that vLLM's own loader would read, in its order."""
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
    except Exception as error:  # of vLLM, huggingface_hub, ModelScope, the network
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapMoEError(
            f"model={model.model!r}: vLLM finds no weights of it ({reason}); download it first, or name its folder"
        ) from None
    # Links are not followed: a hub's snapshots and a user's `latest` keep their own names.
    return Path(os.path.abspath(folder)), sorted(Path(os.path.abspath(file)) for file in files)


def _settings_file(name: str, model: Model, folder: Path) -> Path | None:
    """A file beside the weights, or where vLLM has put it: with `download_dir` that is elsewhere."""
    described = model.hf_config_path or model.model
    for place in (Path(described), folder):
        if (place / name).is_file():
            return place / name
    found = try_get_local_file(described, name, revision=model.revision or "main")
    return found if isinstance(found, Path) and found.is_file() else None


def config_folder(model: Model) -> Path:
    """The folder on this machine that holds a model's `config.json`.

    Raises:
        AdapMoEError: there is none.
    """
    path = _settings_file("config.json", model, Path(model.model))
    if path is None:
        raise AdapMoEError(f"model={model.model!r} has no config.json on this machine; download it first")
    return path.parent


def model_hash(model: Model, load: LoadConfig) -> str:
    """The hash of every byte of a model, as a profile names it.

    Raises:
        AdapMoEError: as `source_files`, or a file cannot be read.
    """
    try:
        return source_files(model, load).model_hash()
    except StoreError as error:
        raise AdapMoEError(f"model={model.model!r}: {error}") from None


def checkpoint_hash(folder: Path) -> str:
    """The hash of a checkpoint that vLLM would load from a folder with its defaults.

    Raises:
        AdapMoEError: as `model_hash`.
    """
    return model_hash(Folder(str(folder)), LoadConfig())


def load_identity(vllm_config: VllmConfig) -> dict[str, str]:
    """The part of a pack's settings that is known before any layer is built."""
    model, load, parallel = vllm_config.model_config, vllm_config.load_config, vllm_config.parallel_config
    return {
        "kind of weights": "random" if load.load_format == "dummy" else "a checkpoint's",
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "vllm": vllm_version,
        "tensor_parallel_size": str(parallel.tensor_parallel_size),
    }
