"""Where a calibration stands, in a file beside its output: what is done is not done again."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vllm_adapmoe.calibrate.statistics import Sums


class Progress:
    """Results of finished pieces of work, by name; each is written as soon as it is there.

    Args:
        path: of the file.
        settings: what the results depend on; a file made with others is not used.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.dumps(settings, sort_keys=True)
        self.done: dict[str, Sums] = {}
        self.resumed = False
        if path.is_file():
            with np.load(path) as file:
                if str(file["settings"]) == self.settings:
                    self.resumed = True
                    for name in file.files:
                        piece, _, key = name.rpartition("/")
                        if piece:
                            self.done.setdefault(piece, {})[key] = file[name]

    def add(self, piece: str, sums: Sums) -> None:
        """Keeps the results of `piece`, on disk before this returns."""
        self.done[piece] = sums
        arrays = {f"{name}/{key}": value for name, part in self.done.items() for key, value in part.items()}
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, settings=np.array(self.settings), **arrays)  # type: ignore[arg-type]
        temporary.replace(self.path)

    def finish(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)
