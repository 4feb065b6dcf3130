"""Routing traces: what every step of live traffic asked of every layer, and what was foretold of it.

A trace is a line of JSON (`TraceInfo`) and then frames, each 4 bytes of length and a zlib-compressed safetensors
container with the arrays of up to `FRAME_STEPS` steps. A frame that was cut short by a kill is left out when reading.
"""

import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from vllm_adapmoe.cache.controller import CacheShape
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.prefetch.foresight import Foretold

FORMAT = 1
FRAME_STEPS = 64
FRAME_ROWS = 4096
SAMPLE = 64
"""Rows of a step that predictions are made for; of a larger step every n-th."""


@dataclass(frozen=True)
class TraceInfo:
    """What a trace is of."""

    model: str
    num_experts: list[int]
    """Of each MoE layer."""
    top_k: int
    lookahead: int
    """Later layers that predictions are recorded for; 0: none are."""
    expert_bytes: list[int]
    """Bytes of an expert of each MoE layer."""
    pool_of: list[int]
    """Pool of each MoE layer: layers whose experts have one shape share one."""
    format: int = FORMAT

    @property
    def shape(self) -> CacheShape:
        return CacheShape(self.num_experts, self.top_k, self.pool_of, self.expert_bytes)


@dataclass
class Step:
    """One step of the engine.

    Rows are the tokens of the step, request by request.
    """

    seconds: float
    """When it began, of a monotonic clock."""
    requests: list[str]
    """Id of each row's request."""
    positions: np.ndarray
    """int32 `[rows]`, in its request."""
    ids: np.ndarray
    """Integer `[layers, rows, top_k]`, as the router chose."""
    weights: np.ndarray
    """float16 `[layers, rows, top_k]`, after gating; 0: dropped."""
    foretold: dict[tuple[int, int], Foretold]
    """(layer, lookahead) -> prediction for the sampled rows from that layer's input; layer -1: from the end of the
    step, for the first layer of the next."""
    expected: dict[int, np.ndarray] = field(default_factory=dict)
    """Layer -> float16 `[experts]`: chance that the layer's next event uses each (`heads.chance_of_any`)."""
    begin: np.ndarray | None = None
    """float16 `[layers, experts]`, of the first layers: chance that the step uses each, as known before it began."""

    @property
    def prompt_tokens(self) -> int:
        """Rows of requests that have several."""
        return sum(rows for rows in Counter(self.requests).values() if rows > 1)


def sample_rows(rows: int) -> slice:
    """The rows of a step that predictions are made for."""
    return slice(0, rows, -(-rows // SAMPLE) if rows else 1)


class TraceWriter:
    """Writes a trace to `path`; when it has grown to `max_bytes` it becomes `path.1`, and a new one begins.

    Raises:
        AdapMoEError: the file cannot be written.
    """

    def __init__(self, path: Path, info: TraceInfo, max_bytes: int) -> None:
        self.path = path
        self.info = info
        self.max_bytes = max_bytes
        self.steps: list[Step] = []
        self._open()

    def _open(self) -> None:
        try:
            self.file = self.path.open("wb")
        except OSError as error:
            raise AdapMoEError(
                f"trace_out={str(self.path)!r} cannot be written ({error.strerror}); name another file"
            ) from None
        self.file.write(json.dumps(asdict(self.info)).encode() + b"\n")

    def add(self, step: Step) -> None:
        """Adds a step; it reaches the file with its frame."""
        self.steps.append(step)
        if len(self.steps) >= FRAME_STEPS or sum(len(step.positions) for step in self.steps) >= FRAME_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the frame under way."""
        if not self.steps:
            return
        data = zlib.compress(save(_frame(self.steps, self.info)), 1)
        self.steps = []
        if self.file.tell() + len(data) > self.max_bytes:
            self.file.close()
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            self._open()
        self.file.write(struct.pack("<I", len(data)) + data)
        self.file.flush()

    def close(self) -> None:
        self.flush()
        self.file.close()


def _frame(steps: Sequence[Step], info: TraceInfo) -> dict[str, np.ndarray]:
    ids_type = np.uint8 if max(info.num_experts) <= 256 else np.uint16
    names = sorted({request for step in steps for request in step.requests})
    index = {name: number for number, name in enumerate(names)}
    arrays = {
        "seconds": np.array([step.seconds for step in steps]),
        "rows": np.array([len(step.positions) for step in steps], dtype=np.int32),
        "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
        "requests": np.array([index[request] for step in steps for request in step.requests], dtype=np.int32),
        "positions": np.concatenate([step.positions for step in steps]).astype(np.int32),
        "ids": np.concatenate([step.ids for step in steps], axis=1).astype(ids_type),
        "weights": np.concatenate([step.weights for step in steps], axis=1).astype(np.float16),
    }
    for key in sorted({key for step in steps for key in step.foretold}):
        made = [step.foretold.get(key) for step in steps]
        name = f"foretold.{key[0]}.{key[1]}"
        arrays[f"{name}.rows"] = np.array([-1 if one is None else len(one.ids) for one in made], dtype=np.int32)
        arrays[f"{name}.ids"] = np.concatenate([one.ids for one in made if one is not None]).astype(ids_type)
        arrays[f"{name}.kept"] = np.concatenate([one.kept for one in made if one is not None])
    if any(step.begin is not None for step in steps):
        arrays["begin.of"] = np.array([step.begin is not None for step in steps])
        arrays["begin"] = np.stack([step.begin for step in steps if step.begin is not None])
    for layer in sorted({layer for step in steps for layer in step.expected}):
        arrays[f"expected.{layer}.of"] = np.array([layer in step.expected for step in steps])
        arrays[f"expected.{layer}"] = np.stack([step.expected[layer] for step in steps if layer in step.expected])
    return arrays


def _steps(arrays: dict[str, np.ndarray]) -> Iterator[Step]:
    names = json.loads(arrays["names"].tobytes())
    foretold: list[dict[tuple[int, int], Foretold]] = [{} for _ in arrays["rows"]]
    for name in arrays:
        if name.startswith("foretold.") and name.endswith(".rows"):
            prefix = name.removesuffix(".rows")
            _, layer, distance = prefix.split(".")
            start = 0
            for number, rows in enumerate(arrays[name].tolist()):
                if rows >= 0:
                    made = [arrays[f"{prefix}.{part}"][start : start + rows] for part in ("ids", "kept")]
                    foretold[number][int(layer), int(distance)] = Foretold(made[0].astype(np.int64), made[1])
                    start += rows
    expected: list[dict[int, np.ndarray]] = [{} for _ in arrays["rows"]]
    for name in arrays:
        if name.startswith("expected.") and name.endswith(".of"):
            prefix = name.removesuffix(".of")
            for number, chances in zip(np.flatnonzero(arrays[name]).tolist(), arrays[prefix], strict=True):
                expected[number][int(prefix.removeprefix("expected."))] = chances
    begin: list[np.ndarray | None] = [None for _ in arrays["rows"]]
    if "begin" in arrays:
        for number, chances in zip(np.flatnonzero(arrays["begin.of"]).tolist(), arrays["begin"], strict=True):
            begin[number] = chances
    start = 0
    for number, rows in enumerate(arrays["rows"].tolist()):
        here = slice(start, start + rows)
        start += rows
        yield Step(
            seconds=float(arrays["seconds"][number]),
            requests=[names[index] for index in arrays["requests"][here].tolist()],
            positions=arrays["positions"][here],
            ids=arrays["ids"][:, here].astype(np.int64),
            weights=arrays["weights"][:, here],
            foretold=foretold[number],
            expected=expected[number],
            begin=begin[number],
        )


def read_trace(path: Path) -> tuple[TraceInfo, list[Step]]:
    """Reads a trace, with the older part `path.1` before it if there is one.

    Raises:
        AdapMoEError: not a trace, or of another format.
    """
    older = path.with_name(path.name + ".1")
    steps: list[Step] = []
    info = None
    for part in (older, path):
        if part == path or part.exists():
            info = _read(part, steps)
    assert info is not None
    if not steps:
        raise AdapMoEError(f"trace {str(path)!r} has no step yet; send requests, then stop the server or wait")
    return info, steps


def _read(path: Path, steps: list[Step]) -> TraceInfo:
    try:
        with path.open("rb") as file:
            info = TraceInfo(**json.loads(file.readline()))
            while length := file.read(4):
                data = file.read(struct.unpack("<I", length)[0]) if len(length) == 4 else b""
                try:
                    arrays = load(zlib.decompress(data))
                except zlib.error:  # cut short
                    break
                steps.extend(_steps(arrays))
    except OSError as error:
        raise AdapMoEError(f"trace {str(path)!r} cannot be read ({error.strerror}); name a file of trace_out") from None
    except (ValueError, TypeError, AttributeError):
        raise AdapMoEError(f"{str(path)!r} is not a trace; name a file that trace_out wrote") from None
    if info.format != FORMAT:
        raise AdapMoEError(f"trace {str(path)!r} has format {info.format}, not {FORMAT}; record it anew")
    return info
