"""What a packed file was made from: enough to never serve the experts of another model."""

from pathlib import Path

from blake3 import blake3
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig

from vllm_adapmoe.config import AdapMoEError

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SAMPLES = 64
BLOCK = 4096


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


def checkpoint_hash(folder: Path) -> str:
    """Hash of a checkpoint's configuration and weights.

    Hashing every byte would cost as much as loading them, so of each weight file it takes the name, the size, the
    first block (with safetensors: names, types and places of the tensors) and evenly spread samples.
    """
    digest = blake3()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for path in sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - BLOCK) * sample // (SAMPLES - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:32]


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
