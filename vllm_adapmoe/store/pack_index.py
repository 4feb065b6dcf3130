"""The index of a packed file: what it was made from, where each record is, and its checksum.

What it was made from are settings (`identity`) and files (`sources`), each with the hash of all its bytes, and with the
size, times and inode that it had: while those stay, a start need not read it.

A pack is one block that points to the index, then the records, then the index. The block is written last, with a
checksum of its own and of the index, and the file gets its name only then: what is truncated, half-written or
damaged does not check out.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from blake3 import blake3

from vllm_adapmoe.store.file_hash import Stamp
from vllm_adapmoe.store.record import ALIGNMENT, RecordLayout, align
from vllm_adapmoe.store.source_files import SourceFile

MAGIC = b"adapmoe-experts\x02"
HEAD = struct.Struct("<16sQQ32s")  # magic, offset and size of the index, its checksum; then a checksum of these
DIGEST_SIZE = 16
INDEX_BYTES = 64 << 20
"""Of an index; that of 100 layers with 1,024 experts has 4 MiB."""


def digest(data: Any) -> bytes:
    """The checksum of a record."""
    return blake3(data, max_threads=1).digest(DIGEST_SIZE)


@dataclass
class PackIndex:
    """Layouts, places and checksums of all records of a pack."""

    identity: dict[str, str]
    origin: str = ""
    """Where the model was (`SourceFiles.origin`)."""
    sources: list[SourceFile] = field(default_factory=list)
    layouts: list[RecordLayout] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of each layer's first record; its records follow one another."""
    digests: list[list[bytes]] = field(default_factory=list)
    """Per layer, per expert."""

    def encode(self) -> bytes:
        layers = [
            layer_to_json(layout, offset, digests)
            for layout, offset, digests in zip(self.layouts, self.offsets, self.digests, strict=True)
        ]
        sources = [
            {"name": source.name, "hash": source.hash} | ({} if source.stamp is None else asdict(source.stamp))
            for source in self.sources
        ]
        content = {"identity": self.identity, "origin": self.origin, "sources": sources, "layers": layers}
        return json.dumps(content).encode()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        index = cls(content["identity"], content["origin"])
        for source in content["sources"]:
            name, value = source.pop("name"), source.pop("hash")
            index.sources.append(SourceFile(name, value, Stamp(**source) if source else None))
        for layer in content["layers"]:
            layout, offset, digests = layer_from_json(layer)
            index.layouts.append(layout)
            index.offsets.append(offset)
            index.digests.append(digests)
        return index


def layer_to_json(layout: RecordLayout, offset: int, digests: Sequence[bytes]) -> dict[str, Any]:
    """Where the records of a layer are, and what they are."""
    return {"layout": layout.to_json(), "offset": offset, "digests": [digest.hex() for digest in digests]}


def layer_from_json(layer: dict[str, Any]) -> tuple[RecordLayout, int, list[bytes]]:
    """What `layer_to_json` described.

    Raises:
        ValueError, KeyError, TypeError: it did not.
    """
    return (
        RecordLayout.from_json(layer["layout"]),
        int(layer["offset"]),
        [bytes.fromhex(digest) for digest in layer["digests"]],
    )


def encode_head(offset: int, index: bytes) -> bytes:
    """The first block of a pack whose index stands at `offset`."""
    head = HEAD.pack(MAGIC, offset, len(index), blake3(index).digest())
    return (head + blake3(head).digest()).ljust(ALIGNMENT, b"\0")


def decode_head(block: bytes, file_size: int) -> tuple[int, int, bytes]:
    """Offset, size and checksum of the index.

    Raises:
        ValueError: not the first block of a whole pack of this format.
    """
    head, checksum = block[: HEAD.size], block[HEAD.size : HEAD.size + 32]
    if len(block) < ALIGNMENT or blake3(head).digest() != checksum:
        raise ValueError("is not a whole pack")
    magic, offset, size, index_checksum = HEAD.unpack(head)
    if magic != MAGIC:
        raise ValueError("has another format version")
    if size > INDEX_BYTES:
        raise ValueError(f"has an index of {size} bytes, of {INDEX_BYTES} at most")
    if file_size != offset + align(size):
        raise ValueError(f"has {file_size} bytes instead of {offset + align(size)}")
    return offset, size, index_checksum
