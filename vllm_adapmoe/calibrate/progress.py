"""Progress of a calibration, in a file beside the output, from which an interrupted calibration resumes."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors.numpy import save

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import BadFile, NoFile, parse_arrays, read_bytes
from vllm_adapmoe.profile.statistics import Sums

SETTINGS = "settings"
DIGEST_SIZE = 32


class Progress:
    """Results of finished pieces of work, by name; each is written to disk as soon as it is finished.

    Args:
        path: the progress file.
        settings: everything the results depend on; a file made with other settings is ignored.
        most: maximum size of the file, bytes.

    Raises:
        AdapMoEError: the file is damaged, is not a progress file, or belongs to another user.
    """

    def __init__(self, path: Path, settings: dict[str, Any], max_bytes: int) -> None:
        self.path = path
        self.settings = json.dumps(settings, sort_keys=True).encode()
        self.done: dict[str, Sums] = {}
        self.resumed = False
        try:
            data = read_bytes(path, max_bytes)
            if path.stat().st_uid != os.geteuid():
                raise BadFile("is another user's")
            arrays = parse_arrays(data[DIGEST_SIZE:])
            if data[:DIGEST_SIZE] != _digest(data[DIGEST_SIZE:]) or SETTINGS not in arrays:
                raise BadFile("is damaged")
        except NoFile:
            return
        except BadFile as problem:
            raise AdapMoEError(
                f"the calibration to go on with, {str(path)!r}, {problem}; remove it to start again"
            ) from None
        if arrays.pop(SETTINGS).tobytes() == self.settings:
            self.resumed = True
            for name, value in arrays.items():
                piece, _, key = name.rpartition("/")
                self.done.setdefault(piece, {})[key] = value

    def add(self, piece: str, sums: Sums) -> None:
        """Stores the results of `piece`; they are written to disk before this returns."""
        self.done[piece] = sums
        arrays = {f"{name}/{key}": value for name, part in self.done.items() for key, value in part.items()}
        temporary = self.path.with_name(self.path.name + ".tmp")
        data = save({SETTINGS: np.frombuffer(self.settings, dtype=np.uint8)} | arrays)
        with temporary.open("wb") as file:
            file.write(_digest(data))
            file.write(data)
        temporary.replace(self.path)

    def finish(self) -> None:
        """Removes the progress file."""
        self.path.unlink(missing_ok=True)


def _digest(data: bytes) -> bytes:
    return blake3(data).digest(DIGEST_SIZE)
