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

FIRST = "first"


@dataclass(frozen=True)
class NextTokenHeads:
    """One head per layer, and one that predicts the first layer from the model's last hidden state.

    The head of a layer maps the input of its experts to the chance that the *next* token of the sequence uses each of
    them, which the cache uses for eviction. (AdapMoE, eq. 9, has a head for the first layer alone; the others are
    ours.)
    """

    layers: list[np.ndarray]
    """Head of each MoE layer, float32 `[hidden + 1, experts]`; the last row is the constant."""
    first: np.ndarray
    """Head from the model's last hidden state to the first MoE layer's experts, float32 `[hidden + 1, experts]`."""

    def save(self, path: Path) -> str:
        """Writes the file atomically; returns its hash. Equal heads give equal files."""
        data = save({FIRST: self.first} | {f"layer.{index}": weights for index, weights in enumerate(self.layers)})
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
        return _hash(data)

    @classmethod
    def load(cls, path: Path, digest: str, layers: int, hidden: int, experts: int) -> Self:
        """Reads the heads of a profile.

        Args:
            path: path of the file.
            digest: hash that `save` returned when the profile was made.
            layers: number of MoE layers of the model.
            hidden: size of its hidden states; the inputs of its experts may have up to twice that size.
            experts: number of experts of a layer.

        Raises:
            AdapMoEError: unreadable, not the heads of that profile, or not fitting that model.
        """
        name = f"next-token heads {str(path)!r}"
        rows = range(2, 2 * hidden + 2)
        max_bytes = (layers + 1) * rows[-1] * experts * np.dtype(np.float32).itemsize + HEADER_BYTES
        try:
            data = read_bytes(path, max_bytes)
        except BadFile as problem:
            raise AdapMoEError(
                f"{name} of the profile: the file {problem}; put the file beside the profile, or make both with "
                "adapmoe calibrate"
            ) from None
        if _hash(data) != digest:
            raise AdapMoEError(
                f"{name} differ from those that the profile was made with; make both with adapmoe calibrate"
            )
        try:
            arrays = parse_arrays(data)
        except BadFile as problem:
            raise AdapMoEError(f"{name}: the file {problem}; make it anew with adapmoe calibrate") from None
        names = [*(f"layer.{index}" for index in range(layers)), FIRST]
        if arrays.keys() != set(names):
            raise AdapMoEError(
                f"{name}: the file has {len(arrays)} arrays, not {len(names)} named layer.0 to layer.{layers - 1} and "
                f"{FIRST}; make it anew with adapmoe calibrate"
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
            inputs: input size of each layer's experts.
            hidden: size of the last hidden states.

        Raises:
            AdapMoEError: names the first head that does not fit.
        """
        if len(inputs) != len(self.layers):
            raise AdapMoEError(
                f"the next-token heads are for {len(self.layers)} MoE layers, but the model has {len(inputs)}; make a "
                "profile of the model with adapmoe calibrate"
            )
        for name, head, size in zip(
            [*map(str, range(len(inputs))), FIRST], [*self.layers, self.first], [*inputs, hidden], strict=True
        ):
            if len(head) != size + 1:
                raise AdapMoEError(
                    f"the next-token head {name} has {len(head) - 1} inputs, but the model has {size}; make a profile "
                    "of the model with adapmoe calibrate"
                )


def heads_path(profile: str | Path) -> Path:
    """Returns the path of a profile's heads: beside it, with the suffix `.heads`.

    A safetensors file without that suffix: in a checkpoint folder vLLM would load it as weights.
    """
    return Path(profile).expanduser().with_suffix(".heads")


def _hash(data: bytes) -> str:
    return blake3(data).hexdigest()
