"""Index of a packed file: what the pack was made from, and the offset and checksum of each record.

A pack is made from settings (`identity`) and files (`sources`). Each source is recorded with the hash of all its bytes
and with its size, times and inode: while those are unchanged, a start does not read the file again.

A pack is one block that points to the index, then the records, then the index. The block is written last, with a
checksum of its own and of the index, and the file is renamed to its final name only then: truncated, half-written or
damaged packs fail verification.
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
"""Maximum bytes of an index; that of 100 layers with 1,024 experts has 4 MiB."""


def digest(data: Any) -> bytes:
    """Returns the checksum of a record."""
    return blake3(data, max_threads=1).digest(DIGEST_SIZE)


@dataclass
class PackIndex:
    """Layouts, offsets and checksums of all records of a pack, and what it was made from."""

    identity: dict[str, str]
    origin: str = ""
    """Location of the model (`SourceFiles.origin`)."""
    sources: list[SourceFile] = field(default_factory=list)
    layouts: list[RecordLayout] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Offset of each layer's first record; a layer's records are consecutive."""
    digests: list[list[bytes]] = field(default_factory=list)
    """Checksum of each record, per layer, per expert."""

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
    """Returns the JSON form of a layer: layout, offset and checksums of its records."""
    return {"layout": layout.to_json(), "offset": offset, "digests": [digest.hex() for digest in digests]}


def layer_from_json(layer: dict[str, Any]) -> tuple[RecordLayout, int, list[bytes]]:
    """Returns the layout, offset and checksums that `layer_to_json` described.

    Raises:
        ValueError, KeyError, TypeError: not such a description.
    """
    return (
        RecordLayout.from_json(layer["layout"]),
        int(layer["offset"]),
        [bytes.fromhex(digest) for digest in layer["digests"]],
    )


def encode_head(offset: int, index: bytes) -> bytes:
    """Returns the first block of a pack whose index is at `offset`."""
    head = HEAD.pack(MAGIC, offset, len(index), blake3(index).digest())
    return (head + blake3(head).digest()).ljust(ALIGNMENT, b"\0")


def decode_head(block: bytes, file_size: int) -> tuple[int, int, bytes]:
    """Returns offset, size and checksum of the index, from the first block of a pack.

    Raises:
        ValueError: not the first block of a complete pack of this format.
    """
    head, checksum = block[: HEAD.size], block[HEAD.size : HEAD.size + 32]
    if len(block) < ALIGNMENT or blake3(head).digest() != checksum:
        raise ValueError("is not a complete pack")
    magic, offset, size, index_checksum = HEAD.unpack(head)
    if magic != MAGIC:
        raise ValueError("has another format version")
    if size > INDEX_BYTES:
        raise ValueError(f"has an index of {size} bytes, more than the maximum of {INDEX_BYTES}")
    if file_size != offset + align(size):
        raise ValueError(f"has {file_size} bytes instead of {offset + align(size)}")
    return offset, size, index_checksum
