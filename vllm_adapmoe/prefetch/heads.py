"""NextTokenHeads: linear maps that predict the routing of a sequence's next token. Fitted by `adapmoe calibrate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from blake3 import blake3
from safetensors.numpy import save

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import HEADER_BYTES, BadFile, parse_arrays, read_bytes

MIN_PROB, MAX_PROB = 0.005, 0.995
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
    def load(cls, path: Path, digest: str, layers: int, hidden: int, experts: int) -> Self:
        """Reads what a profile belongs with.

        Args:
            path: of the file.
            digest: what `save` returned when the profile was made.
            layers: MoE layers of the model.
            hidden: size of its hidden states; what its experts see may be another, up to twice that.
            experts: of a layer.

        Raises:
            AdapMoEError: unreadable, not the heads of that profile, or not such as that model has.
        """
        name = f"next-token heads {str(path)!r}"
        rows = range(2, 2 * hidden + 2)
        most = (layers + 1) * rows[-1] * experts * np.dtype(np.float32).itemsize + HEADER_BYTES
        try:
            data = read_bytes(path, most)
        except BadFile as problem:
            raise AdapMoEError(
                f"{name} of the profile: the file {problem}; put the file beside the profile, or make both with "
                "adapmoe calibrate"
            ) from None
        if _hash(data) != digest:
            raise AdapMoEError(f"{name} are not those that the profile was made with; make both with adapmoe calibrate")
        try:
            arrays = parse_arrays(data)
        except BadFile as problem:
            raise AdapMoEError(f"{name}: the file {problem}; make it anew with adapmoe calibrate") from None
        names = [*(f"layer.{index}" for index in range(layers)), FIRST]
        if arrays.keys() != set(names):
            raise AdapMoEError(
                f"{name} are {len(arrays)} arrays, not one for each of {layers} layers and one for the first; make "
                "them anew with adapmoe calibrate"
            )
        for key, array in arrays.items():
            fits = array.dtype == np.float32 and array.ndim == 2 and array.shape[1] == experts
            if not (fits and array.shape[0] in rows and np.isfinite(array).all()):
                raise AdapMoEError(
                    f"{name}: {key} is {array.dtype} {list(array.shape)}, not finite float32 [hidden + 1, {experts}] "
                    f"with hidden={hidden}; make them anew with adapmoe calibrate"
                )
        return cls([arrays[key] for key in names[:-1]], arrays[FIRST])

    def check(self, inputs: Sequence[int], hidden: int) -> None:
        """Refuses heads that do not fit the model as it was built.

        Args:
            inputs: size of the input of each layer's experts.
            hidden: size of the last hidden states.

        Raises:
            AdapMoEError: names the first that does not.
        """
        if len(inputs) != len(self.layers):
            raise AdapMoEError(
                f"the next-token heads are of {len(self.layers)} MoE layers, the model has {len(inputs)}; make a "
                "profile of it with adapmoe calibrate"
            )
        for name, head, size in zip(
            [*map(str, range(len(inputs))), FIRST], [*self.layers, self.first], [*inputs, hidden], strict=True
        ):
            if len(head) != size + 1:
                raise AdapMoEError(
                    f"the next-token head {name} takes {len(head) - 1} inputs, the model gives {size}; make a profile "
                    "of it with adapmoe calibrate"
                )


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
    chances = np.minimum(np.maximum(outputs, MIN_PROB), MAX_PROB)
    if len(chances) == 1:
        return chances[0].astype(np.float16)
    return (1 - np.prod(1 - chances, axis=0)).astype(np.float16)


def _hash(data: bytes) -> str:
    return blake3(data).hexdigest()
