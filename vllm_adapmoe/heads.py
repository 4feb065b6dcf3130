"""NextTokenHeads: linear maps that foretell the routing of a sequence's next token. Fitted by `adapmoe calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vllm_adapmoe.config import AdapMoEError

LEAST, MOST = 0.005, 0.995
"""Chances are never surer than that: a head is linear, and may leave [0, 1]."""
FIRST = "first"


@dataclass(frozen=True)
class NextTokenHeads:
    """One head a layer, and one for the first layer from the end of the model.

    The head of a layer maps the input of its experts to the chance that the *next* token of the sequence uses each of
    them. A cache wants to know that when it lets an expert go. (AdapMoE, eq. 9, has a head for the first layer alone;
    the others are ours.)
    """

    layers: list[np.ndarray]
    """Of each MoE layer, float32 `[hidden + 1, experts]`; the last row is the constant."""
    first: np.ndarray
    """float32 `[hidden + 1, experts]`: from the model's last hidden state to the first MoE layer's experts."""

    def save(self, path: Path) -> str:
        """Writes the file, whole or not at all; returns its hash. Equal heads give equal files."""
        data = save({FIRST: self.first} | {f"layer.{index}": weights for index, weights in enumerate(self.layers)})
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
        return _hash(data)

    @classmethod
    def load(cls, path: Path, digest: str) -> Self:
        """Reads what a profile belongs with.

        Args:
            path: of the file.
            digest: what `save` returned when the profile was made.

        Raises:
            AdapMoEError: unreadable, or not the heads of that profile.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise AdapMoEError(
                f"next-token heads {str(path)!r} of the profile cannot be read ({error.strerror}); put the file beside "
                "the profile, or make both with adapmoe calibrate"
            ) from None
        if _hash(data) != digest:
            raise AdapMoEError(
                f"next-token heads {str(path)!r} are not those that the profile was made with; make both with "
                "adapmoe calibrate"
            )
        try:
            arrays = load(data)
        except SafetensorError as error:
            raise AdapMoEError(f"next-token heads {str(path)!r} are damaged ({error}); make them anew") from None
        first = arrays.pop(FIRST)
        return cls([arrays[f"layer.{index}"] for index in range(len(arrays))], first)


def heads_path(profile: str | Path) -> Path:
    """Where the heads of a profile are: beside it, under its name.

    A safetensors file, but not called so: in the folder of a checkpoint it would be taken for weights.
    """
    return Path(profile).expanduser().with_suffix(".heads")


def chance_of_any(outputs: np.ndarray) -> np.ndarray:
    """Chance that the next step of a batch uses each expert: `1 - prod (1 - p)` over its requests.

    Args:
        outputs: `[requests, experts]` of a head, or `[requests, layers, experts]` of several.

    Returns:
        float16 `[experts]` or `[layers, experts]`, the precision that a trace keeps it in, so that a replay sees what
        the cache saw.
    """
    chances = np.minimum(np.maximum(outputs, LEAST), MOST)
    if len(chances) == 1:
        return chances[0].astype(np.float16)
    return (1 - np.prod(1 - chances, axis=0)).astype(np.float16)


def _hash(data: bytes) -> str:
    return blake3(data).hexdigest()
