"""Writes routing traces: the experts chosen in every step and layer of live traffic, and the predictions made.

A trace is a line of JSON (`TraceInfo`) followed by frames, each 4 bytes of length and a zlib-compressed safetensors
container with the arrays of up to `FRAME_STEPS` steps. `trace_file` reads it.
"""

import json
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field
from safetensors.numpy import save

from vllm_adapmoe.config import AdapMoEError, PrefetchConfig
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.profile.model_profile import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K

logger = logging.getLogger(__name__)

FORMAT: Literal[1] = 1
FRAME_STEPS = 64
FRAME_ROWS = 4096
FRAME_BYTES = 1 << 28
"""Maximum size of a frame's arrays: enough for 119,000 tokens of 94 layers that choose 8 experts."""
SAMPLE = 64
"""Maximum rows per step for which predictions are made; a larger step is sampled at every n-th row."""
TRACE_LOOKAHEAD = 4
"""Minimum number of later layers that a trace has predictions for."""

PerLayer = Field(min_length=1, max_length=MAX_LAYERS, fail_fast=True)


def layers_ahead(prefetch: PrefetchConfig, tracing: bool) -> int:
    """Returns the number of later layers to predict; at least `TRACE_LOOKAHEAD` for a trace, as replays may vary it."""
    return max(TRACE_LOOKAHEAD, prefetch.lookahead) if tracing else prefetch.lookahead


@dataclass(frozen=True)
class TraceInfo:
    """Description of the traced model and cache; the bounds are enforced when a trace is read."""

    model: Annotated[str, Field(max_length=4096)]
    num_experts: Annotated[list[Annotated[int, Field(ge=1, le=MAX_EXPERTS)]], PerLayer]
    """Number of experts of each MoE layer."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)]
    lookahead: Annotated[int, Field(ge=0, le=MAX_LAYERS)]
    """Layers ahead for which predictions are recorded; 0: none."""
    expert_bytes: Annotated[list[Annotated[int, Field(ge=0, le=1 << 50)]], PerLayer]
    """Bytes per expert of each MoE layer."""
    pool_of: Annotated[list[Annotated[int, Field(ge=0, le=MAX_LAYERS)]], PerLayer]
    """Slot pool of each MoE layer; layers whose experts have the same shape share a pool."""
    format: Literal[1] = FORMAT

    @property
    def shape(self) -> CacheShape:
        return CacheShape(self.num_experts, self.top_k, self.pool_of, self.expert_bytes)


@dataclass
class Step:
    """Routing of one engine step. Its rows are the tokens of the step, request by request."""

    seconds: float
    """Start time of the step, seconds of a monotonic clock."""
    requests: list[str]
    """Request id of each row."""
    positions: np.ndarray
    """Position of each row in its request, int32 `[rows]`."""
    ids: np.ndarray
    """Experts chosen by the router, integer `[layers, rows, top_k]`."""
    weights: np.ndarray
    """Expert weights after gating, float16 `[layers, rows, top_k]`; 0: dropped."""
    predicted: dict[tuple[int, int], PredictedExperts]
    """Predictions for the sampled rows, by (layer whose input they are made from, layers ahead); layer -1: made at the
    end of the step for the first layer of the next step."""
    expected: dict[int, np.ndarray] = field(default_factory=dict)
    """Probability by layer that its next event uses each expert, `[experts]` (`heads.chance_of_any`)."""
    begin: np.ndarray | None = None
    """Probability, as known before the step, that the step uses each expert of the first layers, float16
    `[layers, experts]`."""
    drafted: np.ndarray | None = None
    """Whether each row verifies a draft token of speculative decoding, bool `[rows]`; None: none does."""

    @property
    def prompt_tokens(self) -> int:
        """Number of rows that belong to requests with several rows in the step, other than rows of draft tokens."""
        requests = self.requests
        if self.drafted is not None:
            requests = [name for name, drafted in zip(requests, self.drafted.tolist(), strict=True) if not drafted]
        return sum(rows for rows in Counter(requests).values() if rows > 1)


class Steps(Protocol):
    """Steps in order, which can be iterated repeatedly: a list, or a file that is read again each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Step]: ...


def sample_rows(rows: int) -> slice:
    """Returns the rows of a step for which predictions are made."""
    return slice(0, rows, -(-rows // SAMPLE) if rows else 1)


class TraceWriter:
    """Writes a trace to `path`; when it reaches `max_bytes` it is renamed to `path.1` and a new one begins.

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
        """Adds a step; it is written when its frame is full or flushed."""
        self.steps.append(step)
        if len(self.steps) >= FRAME_STEPS or sum(len(step.positions) for step in self.steps) >= FRAME_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the current, incomplete frame."""
        steps, self.steps = self.steps, []
        if steps:
            self._write(steps)

    def _write(self, steps: list[Step]) -> None:
        arrays = save(_frame(steps, self.info))
        if len(arrays) > FRAME_BYTES:
            if len(steps) == 1:
                logger.warning(
                    "trace %r: a step of %d tokens is too large for a frame and is skipped",
                    str(self.path),
                    len(steps[0].positions),
                )
                return
            half = len(steps) // 2
            self._write(steps[:half])
            self._write(steps[half:])
            return
        data = zlib.compress(arrays, 1)
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
    for key in sorted({key for step in steps for key in step.predicted}):
        step_predictions = [step.predicted.get(key) for step in steps]
        name = f"foretold.{key[0]}.{key[1]}"
        arrays[f"{name}.rows"] = np.array(
            [-1 if prediction is None else len(prediction.ids) for prediction in step_predictions], dtype=np.int32
        )
        predictions = [prediction for prediction in step_predictions if prediction is not None]
        arrays[f"{name}.ids"] = np.concatenate([prediction.ids for prediction in predictions]).astype(ids_type)
        arrays[f"{name}.kept"] = np.concatenate([prediction.keep_mask for prediction in predictions])
    if any(step.begin is not None for step in steps):
        arrays["begin.of"] = np.array([step.begin is not None for step in steps])
        arrays["begin"] = np.stack([step.begin for step in steps if step.begin is not None]).astype(np.float16)
    if any(step.drafted is not None for step in steps):
        arrays["drafted"] = np.concatenate(
            [np.zeros(len(step.positions), dtype=bool) if step.drafted is None else step.drafted for step in steps]
        )
    for layer in sorted({layer for step in steps for layer in step.expected}):
        arrays[f"expected.{layer}.of"] = np.array([layer in step.expected for step in steps])
        chances = [step.expected[layer] for step in steps if layer in step.expected]
        arrays[f"expected.{layer}"] = np.stack(chances).astype(np.float16)
    return arrays
