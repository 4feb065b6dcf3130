"""The journal beside a pack that is being written: which layers are whole, so that the next writer goes on after them.

One line for what the pack is made from, then one for each layer that has been written; each begins with its own
checksum. A line that does not check out ends the journal: it was torn, as its writer was killed.
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
MOST_BYTES = 256 << 20
"""No journal is longer: a record takes 36 bytes."""
Layer = tuple[RecordLayout, int, list[bytes]]
"""Layout, place of the first record in the file, and the records' checksums."""


class PackJournal:
    """Says what a partial file holds. Only the process that has locked the partial file may use its journal.

    Args:
        path: the journal.
        identity: settings that the pack is made with.
        sources: files that it is made from.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], sources: SourceFiles) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        stamps = {name: None if stamp is None else asdict(stamp) for name, stamp in sources.stamps().items()}
        # The bytes of the files are not known yet. What has no stamp may have other ones the next time: no journal of
        # it is ever taken up.
        self._head = {"format": FORMAT, "identity": dict(identity), "origin": sources.origin, "stamps": stamps}
        self._resumable = all(stamp is not None for stamp in stamps.values())

    def read(self) -> dict[int, Layer]:
        """The layers that a writer of the same pack has noted, in the order in which they were written.

        Empty where there is no journal, or one of another pack. What it says of the partial file is yet to be checked.
        """
        try:
            lines = read_bytes(self.path, MOST_BYTES).split(b"\n")
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
            pass  # right checksums over what no writer wrote: as far as it makes sense
        return layers

    def begin(self, layers: Mapping[int, Layer]) -> None:
        """Starts over, with the layers that are kept.

        Raises:
            OSError: as the system says.
        """
        lines = [_line(self._head)] + [_line(_content(index, layer)) for index, layer in layers.items()]
        self._temporary.write_bytes(b"".join(lines))
        self._temporary.replace(self.path)

    def add(self, index: int, layer: Layer) -> None:
        """Notes a layer whose records have all been written.

        Raises:
            OSError: as the system says.
        """
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, _line(_content(index, layer)))
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Ends it: the pack has its name, or is given up."""
        self.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)


def _content(index: int, layer: Layer) -> dict[str, Any]:
    return {"index": index} | layer_to_json(*layer)


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return hash_bytes(text).encode() + b" " + text + b"\n"
