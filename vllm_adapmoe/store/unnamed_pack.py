"""Records of a running process alone: a file without a name, for experts that are replaced while an engine runs."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch

from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import open_direct
from vllm_adapmoe.store.file import FileStore
from vllm_adapmoe.store.pack_index import PackIndex
from vllm_adapmoe.store.pack_writer import write_layer
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, aligned_empty


class UnnamedPack:
    """Takes the experts of a model again and again, and gives a store of what it was given last.

    Its space is taken at once, and goes back when the process ends, however it ends. A store that it gave before is
    not to be read any more once the next experts come.

    Args:
        folder: that it is in.
        layouts: of each layer's records.
        experts: of each layer.

    Raises:
        StoreError: the folder cannot be written, or has too little space.
    """

    def __init__(self, folder: Path, layouts: Sequence[RecordLayout], experts: Sequence[int]) -> None:
        self.folder = folder
        self._layouts = list(layouts)
        self._offsets = [ALIGNMENT]
        for layout, count in zip(layouts, experts, strict=True):
            self._offsets.append(self._offsets[-1] + layout.nbytes * count)
        self._digests: list[list[bytes]] = [[b""] * count for count in experts]
        nbytes = self._offsets.pop()
        try:
            with tempfile.TemporaryFile(dir=folder) as unnamed:
                os.posix_fallocate(unnamed.fileno(), 0, nbytes)
                fd, self._direct = open_direct(Path(f"/proc/self/fd/{unnamed.fileno()}"), os.O_RDWR)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot take {nbytes} bytes for replaced experts ({error.strerror}); free some space, or "
                "set another store_dir"
            ) from None
        self._file = FileIO(fd, "r+")

    def put_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """`StoreWriter.put_layer`, for a layer of the same layout as ever."""
        record = aligned_empty(self._layouts[layer].nbytes).zero_()
        try:
            self._digests[layer] = list(
                write_layer(self._file.fileno(), self._offsets[layer], tensors, record, self._direct)
            )
        except OSError as error:
            raise StoreError(f"replaced experts cannot be written in {self.folder} ({error.strerror})") from None

    def seal(self) -> FileStore:
        """`StoreWriter.seal`: what was put last."""
        fd, direct = open_direct(Path(f"/proc/self/fd/{self._file.fileno()}"), os.O_RDONLY)
        index = PackIndex(
            {}, layouts=self._layouts, offsets=self._offsets, digests=[list(its) for its in self._digests]
        )
        return FileStore(self.folder / "replaced experts", FileIO(fd), direct, index)

    def abort(self) -> None:
        """Gives the space back, once no store of it is open."""
        self._file.close()
