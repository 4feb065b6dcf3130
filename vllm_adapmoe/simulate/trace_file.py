"""Reads a trace frame by frame, since it may be larger than memory; its content is not trusted."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import BadFile, open_binary, parse_json
from vllm_adapmoe.simulate.trace import FORMAT, Step, TraceInfo
from vllm_adapmoe.simulate.trace_frame import read_frame

logger = logging.getLogger(__name__)

INFO_BYTES = 1 << 20
EXPERTS = 1 << 20
"""Maximum of layers times the largest layer's experts, since a replay needs memory for each."""
INFO = TypeAdapter(TraceInfo)


def read_trace(path: Path) -> tuple[TraceInfo, "RecordedSteps"]:
    """Opens a trace, preceded by its older part `path.1` if that exists, and reads it through once.

    An incomplete frame at the end of a part, left by a killed server, is skipped. Memory is bounded by one frame.

    Raises:
        AdapMoEError: not a trace, of another format, damaged, or without any step.
    """
    older = Path(f"{path}.1")
    parts = [TracePart(part) for part in (older, path) if part == path or os.path.lexists(older)]
    if parts[0].info != parts[-1].info:
        raise AdapMoEError(
            f"trace {str(older)!r} is of another server than {str(path)!r}, which should continue it; remove it"
        )
    steps = RecordedSteps(parts)
    if not len(steps):
        raise AdapMoEError(f"trace {str(path)!r} has no step yet; send requests, then stop the server or wait")
    return parts[0].info, steps


class RecordedSteps:
    """Steps of a trace, read from its files again on every iteration."""

    def __init__(self, parts: list["TracePart"]) -> None:
        self.parts = parts
        self.count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Step]:
        for part in self.parts:
            yield from part


class TracePart:
    """One file of a trace, up to its size when it was opened, even if it is renamed or replaced later.

    Raises:
        AdapMoEError: not a trace, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open_binary(path)
        except BadFile as problem:
            raise AdapMoEError(f"trace {str(path)!r} {problem}; name a file of trace_out") from None
        self.size = os.fstat(self.file.fileno()).st_size
        try:
            line, end, _ = self._read(0, min(self.size, INFO_BYTES)).partition(b"\n")
            if not end:
                raise BadFile("has no first line")
            self.info = _info(parse_json(line, INFO_BYTES))
        except BadFile as problem:
            raise AdapMoEError(
                f"{str(path)!r} is not a trace: it {problem}; name a file that this version's trace_out wrote"
            ) from None
        self.start = len(line) + 1

    def _read(self, offset: int, nbytes: int) -> bytes:
        try:
            data = b""
            while len(data) < nbytes and (
                chunk := os.pread(self.file.fileno(), nbytes - len(data), offset + len(data))
            ):
                data += chunk
        except OSError as error:
            raise BadFile(f"cannot be read ({error.strerror})") from None
        if len(data) < nbytes:
            raise BadFile("was cut short while it was read")
        return data

    def __iter__(self) -> Iterator[Step]:
        offset = self.start
        while offset < self.size:
            try:
                bytes_left = self.size - offset - 4
                length = int.from_bytes(self._read(offset, 4), "little") if bytes_left >= 0 else 0
                if not 0 <= length <= bytes_left:
                    logger.warning(
                        "trace %r: the last %d bytes are an incomplete frame and are skipped",
                        str(self.path),
                        bytes_left + 4,
                    )
                    self.size = offset
                    return
                steps = read_frame(self._read(offset + 4, length), self.info)
            except BadFile as problem:
                raise AdapMoEError(
                    f"trace {str(self.path)!r} is damaged: the frame at byte {offset} {problem}; record it anew, or "
                    f"cut it there: truncate --size={offset} to keep what is before"
                ) from None
            yield from steps
            offset += 4 + length


def _info(content: Any) -> TraceInfo:
    if not isinstance(content, dict):
        raise BadFile("does not begin with a JSON object")
    if content.get("format", FORMAT) != FORMAT:
        raise BadFile(f"has format {content['format']!r}, not {FORMAT}")
    try:
        info = INFO.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadFile(f"has no usable {'.'.join(map(str, first['loc']))} ({first['msg'].lower()})") from None
    layers = len(info.num_experts)
    if not layers == len(info.expert_bytes) == len(info.pool_of):
        raise BadFile(f"has {layers} layers, {len(info.expert_bytes)} expert_bytes and {len(info.pool_of)} pool_of")
    if layers * max(info.num_experts) > EXPERTS:
        raise BadFile(f"has {layers} layers of {max(info.num_experts)} experts, more than any model")
    if set(info.pool_of) != set(range(max(info.pool_of) + 1)):
        raise BadFile(f"has pools {sorted(set(info.pool_of))}, not all from 0 on")
    if info.top_k > max(info.num_experts):
        raise BadFile(f"has top_k {info.top_k} of {max(info.num_experts)} experts")
    return info
