"""What the folder of a checkpoint holds: a hash that tells one from another."""

from pathlib import Path

from blake3 import blake3

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SAMPLES = 64
BLOCK = 4096


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
