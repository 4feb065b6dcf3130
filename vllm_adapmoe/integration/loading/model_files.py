"""Finds a model's files on this machine, by what `vllm serve` takes as MODEL, and downloads those that are missing."""

from pathlib import Path

from huggingface_hub import snapshot_download
from vllm import envs
from vllm.config import LoadConfig

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.loading.identity import Folder, source_files
from vllm_adapmoe.model_folder import check_model_folder
from vllm_adapmoe.printable import reason

CONFIG = ["config.json"]
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
"""Patterns of a checkpoint's files other than weights: configuration and tokenizer."""


def config_folder(model: str, revision: str | None = None) -> Path:
    """Returns a folder with a model's `config.json`, which is all that is downloaded of a hub's model.

    Args:
        model: checkpoint folder, or the name of a model on a hub.
        revision: branch, tag or commit on the hub; None: its default.

    Raises:
        AdapMoEError: neither this machine nor the hub has one, or it is unusable.
    """
    return check_model_folder(_snapshot(model, revision, CONFIG))


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """Returns a folder with all files of a model that vLLM reads; those of a hub's model are downloaded to its cache.

    Args:
        model: checkpoint folder, or the name of a model on a hub.
        revision: branch, tag or commit on the hub; None: its default.

    Raises:
        AdapMoEError: neither this machine nor the hub has it, it has no weights, or its configuration is unusable.
    """
    folder = check_model_folder(_snapshot(model, revision, SMALL_FILES))
    if Path(model).is_dir():
        return folder
    # The Hugging Face Hub's snapshots are named by their commits: the weights are to be of the same one.
    weights = Folder(model, revision if envs.VLLM_USE_MODELSCOPE else folder.name)
    return check_model_folder(Path(source_files(weights, LoadConfig()).origin))


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the folder of a model, after downloading the files with these names if it is a hub's."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise AdapMoEError(f"model={model!r} is a file; pass the folder of a checkpoint, or a model on the hub")
    try:
        if envs.VLLM_USE_MODELSCOPE:
            from modelscope.hub.snapshot_download import snapshot_download as download
        else:
            download = snapshot_download
        folder = Path(download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # from huggingface_hub, ModelScope or the network
        raise AdapMoEError(
            f"model={model!r} is not a folder, and cannot be downloaded ({reason(error)}); pass a folder, or a model "
            "on the hub"
        ) from None
    if not (folder / "config.json").is_file():
        raise AdapMoEError(f"model={model!r} has no config.json on this machine; download it first")
    return folder
