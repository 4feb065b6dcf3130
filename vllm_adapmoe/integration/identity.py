"""What a packed file was made from: enough to never serve the experts of another model."""

from pathlib import Path

from vllm import __version__ as vllm_version
from vllm.config import VllmConfig

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.store.checkpoint import checkpoint_hash


def checkpoint_folder(model: str, revision: str | None) -> Path:
    """The folder on this machine that holds the checkpoint `model`, a path or a hub name.

    Raises:
        AdapMoEError: no such folder, and no downloaded snapshot of that name.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise AdapMoEError(
            f"model={model!r} is not a folder or a downloaded model ({error}); download it first"
        ) from None


def model_identity(vllm_config: VllmConfig) -> dict[str, str]:
    """The part of a pack's identity that is known before any layer is built."""
    model, load, parallel = vllm_config.model_config, vllm_config.load_config, vllm_config.parallel_config
    return {
        "model": checkpoint_hash(checkpoint_folder(model.model, model.revision)),
        "load_format": str(load.load_format),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "vllm": vllm_version,
        "tensor_parallel_size": str(parallel.tensor_parallel_size),
    }
