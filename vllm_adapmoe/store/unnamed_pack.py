"""UnnamedPack: a file without a name, private to a process, for experts replaced while an engine runs."""

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
    """Store writer that can be filled repeatedly; `seal` returns a store of the experts put last.

    Its disk space is allocated at once and released when the process ends, however it ends. Earlier stores must not be
    read once experts are put again.

    Args:
        folder: folder of the file.
        layouts: record layout of each layer.
        experts: number of experts of each layer.

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
        """Writes a layer as `StoreWriter.put_layer` does; its layout must not change."""
        record = aligned_empty(self._layouts[layer].nbytes).zero_()
        try:
            self._digests[layer] = list(
                write_layer(self._file.fileno(), self._offsets[layer], tensors, record, self._direct)
            )
        except OSError as error:
            raise StoreError(f"replaced experts cannot be written in {self.folder} ({error.strerror})") from None

    def seal(self) -> FileStore:
        """Returns a store of the experts put last (`StoreWriter.seal`)."""
        fd, direct = open_direct(Path(f"/proc/self/fd/{self._file.fileno()}"), os.O_RDONLY)
        index = PackIndex(
            {},
            layouts=self._layouts,
            offsets=self._offsets,
            digests=[list(layer_digests) for layer_digests in self._digests],
        )
        return FileStore(self.folder / "replaced experts", FileIO(fd), direct, index)

    def abort(self) -> None:
        """Releases the space once no store of it is open."""
        self._file.close()
