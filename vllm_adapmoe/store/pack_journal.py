"""PackJournal: records which layers of a partial pack are complete, so that the next writer can resume after them.

The first line records what the pack is made from, each further line one written layer. Each line begins with its
checksum. A line with a wrong checksum ends the journal: the writer was killed while writing it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_adapmoe.files import BadFile, read_bytes
from vllm_adapmoe.store.file_hash import hash_bytes
from vllm_adapmoe.store.pack_index import layer_from_json, layer_to_json
from vllm_adapmoe.store.record import RecordLayout
from vllm_adapmoe.store.source_files import SourceFiles

FORMAT = 1
MAX_BYTES = 256 << 20
"""Maximum bytes of a journal; a record takes 36 bytes."""
Layer = tuple[RecordLayout, int, list[bytes]]
"""Layout, offset of the first record in the file, and the records' checksums."""


class PackJournal:
    """Journal of a partial file. Only the process that has locked the partial file may use it.

    Args:
        path: path of the journal.
        identity: settings that the pack is made with.
        sources: files that it is made from.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], sources: SourceFiles) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        stamps = {name: None if stamp is None else asdict(stamp) for name, stamp in sources.stamps().items()}
        # The files are not hashed yet. One without a stamp may change unnoticed, so a journal with one is never
        # resumed.
        self._head = {"format": FORMAT, "identity": dict(identity), "origin": sources.origin, "stamps": stamps}
        self._resumable = all(stamp is not None for stamp in stamps.values())

    def read(self) -> dict[int, Layer]:
        """Returns the layers recorded by a writer of the same pack, in the order in which they were written.

        Empty without a journal, or if it belongs to another pack. The caller must verify the records themselves.
        """
        try:
            lines = read_bytes(self.path, MAX_BYTES).split(b"\n")
        except BadFile:
            return {}
        contents = []
        for line in lines:
            checksum, _, text = line.partition(b" ")
            if not text or checksum != hash_bytes(text).encode():
                break
            contents.append(text)
        layers: dict[int, Layer] = {}
        try:
            if not self._resumable or not contents or json.loads(contents[0]) != self._head:
                return {}
            for text in contents[1:]:
                content = json.loads(text)
                layers[int(content["index"])] = layer_from_json(content)
        except (ValueError, KeyError, TypeError, RuntimeError, RecursionError):
            pass  # a correct checksum over content that no writer wrote: keep the layers before it
        return layers

    def begin(self, layers: Mapping[int, Layer]) -> None:
        """Starts a new journal with the layers that are kept.

        Raises:
            OSError: it cannot be written.
        """
        lines = [_line(self._head)] + [_line(_content(index, layer)) for index, layer in layers.items()]
        self._temporary.write_bytes(b"".join(lines))
        self._temporary.replace(self.path)

    def add(self, index: int, layer: Layer) -> None:
        """Records a layer whose records have all been written.

        Raises:
            OSError: it cannot be written.
        """
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, _line(_content(index, layer)))
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Removes the journal, when the pack is finished or abandoned."""
        self.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)


def _content(index: int, layer: Layer) -> dict[str, Any]:
    return {"index": index} | layer_to_json(*layer)


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return hash_bytes(text).encode() + b" " + text + b"\n"
