"""Validates the index of a pack against its file: a correct checksum does not make its content possible."""

from typing import Any

from vllm_adapmoe.files import BadFile, parse_json
from vllm_adapmoe.store.pack_index import DIGEST_SIZE, PackIndex
from vllm_adapmoe.store.record import ALIGNMENT

INDEX_VALUES = 4_000_000
"""Maximum JSON values of an index; a model of 100 layers with 1,024 experts has 100,000 checksums."""


def read_index(data: bytes, end: int) -> PackIndex:
    """Decodes and validates an index.

    Args:
        data: bytes of the index, whose checksum is correct.
        end: offset where the file's records end and the index begins.

    Raises:
        BadFile: not the index of a pack, or its records overlap or are not within the file.
    """
    content = parse_json(data, INDEX_VALUES)
    if not isinstance(content, dict) or not _is_text(content.get("identity")):
        raise BadFile("has an index that is not of a pack")
    try:
        index = PackIndex.from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise BadFile(f"has an index that is not of a pack ({type(error).__name__}: {error})") from None
    spans = []
    for layer, (layout, offset, digests) in enumerate(zip(index.layouts, index.offsets, index.digests, strict=True)):
        if not digests or any(len(digest) != DIGEST_SIZE for digest in digests):
            raise BadFile(f"has no checksum for each expert of MoE layer {layer}")
        size = layout.nbytes * len(digests)
        if not isinstance(offset, int) or offset % ALIGNMENT or not layout.nbytes:
            raise BadFile(f"has MoE layer {layer} at byte {offset}, in records of {layout.nbytes} bytes")
        spans.append((offset, offset + size, layer))
    if not spans:
        raise BadFile("has no layer")
    last = ALIGNMENT
    for start, stop, layer in sorted(spans):
        if not last <= start < stop <= end:
            raise BadFile(f"has MoE layer {layer} at bytes {start} to {stop}, outside of {last} to {end}")
        last = stop
    return index


def _is_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
