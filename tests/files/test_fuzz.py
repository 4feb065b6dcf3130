"""Every reader against damaged files: what it gives can be used, or it ends in one line, in little time and memory.

Damage is at every depth: of the bytes, of the JSON in them, of the arrays in them, with the sizes and checksums of what
is around it made right. `fuzz_with_coverage.py` runs the same with a fuzzer that watches coverage. `tests/data/fuzz`
has files at which readers failed once, each in another place.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import damaged_arrays, damaged_bytes, damaged_json
from readers import INFO, READERS, SETTINGS, frame_of, heads_arrays, index_of, trace_steps, try_reading, with_index
from safetensors.numpy import save

from vllm_adapmoe.simulate.trace import _frame

EXAMPLES = 120
SECONDS = 20
FOUND = sorted((Path(__file__).parents[1] / "data" / "fuzz").glob("*-*"))


def sound(kind: str) -> bytes:
    with TemporaryDirectory() as folder:
        READERS[kind].write(path := READERS[kind].at(Path(folder)))
        return path.read_bytes()


def damaged_frames() -> st.SearchStrategy[bytes]:
    """A trace whose frames are sound containers of damaged arrays, or compress damaged containers."""
    line = json.dumps(asdict(INFO)).encode() + b"\n"
    arrays = _frame(trace_steps(), INFO)
    good = frame_of(save(arrays))
    one = mostly(damaged_arrays(arrays), damaged_bytes(save(arrays)))
    return st.builds(lambda frame, before: line + good * before + frame_of(frame), one, st.integers(0, 1))


def damaged_info() -> st.SearchStrategy[bytes]:
    """A trace with sound frames, of another model."""
    frames = frame_of(save(_frame(trace_steps(), INFO)))
    return damaged_json(asdict(INFO)).map(lambda line: line.replace(b"\n", b" ") + b"\n" + frames)


@st.composite
def mostly(draw: st.DrawFn, deep: st.SearchStrategy[bytes], *shallow: st.SearchStrategy[bytes]) -> bytes:
    """What gets far, and now and then what is refused at once."""
    return draw(draw(st.sampled_from((*(deep,) * 5, *shallow))))


def checked(data: bytes) -> bytes:
    return blake3(data).digest(32) + data


def damaged(kind: str) -> st.SearchStrategy[bytes]:
    data = sound(kind)
    match kind:
        case "config" | "profile" | "model_config":
            return damaged_json(json.loads(data)) | damaged_bytes(data)
        case "heads":
            return mostly(damaged_arrays(heads_arrays()), damaged_bytes(data))
        case "progress":
            arrays = {
                "settings": np.frombuffer(json.dumps(SETTINGS).encode(), dtype=np.uint8),
                "routing/0/loss": np.ones(2),
            }
            return damaged_arrays(arrays).map(checked) | damaged_bytes(data)
        case "pack":
            index = json.loads(index_of(data)[1])
            return mostly(damaged_json(index).map(lambda index: with_index(data, index)), damaged_bytes(data))
        case "trace":
            return mostly(damaged_frames(), damaged_info(), damaged_bytes(data))
    return damaged_bytes(data)


def fuzz(kind: str, examples: int = EXAMPLES) -> Callable[[], None]:
    """A test of one reader that goes through damaged files."""

    @settings(max_examples=examples, deadline=None)
    @given(content=damaged(kind))
    def check(content: bytes) -> None:
        read(kind, content)

    return check


def read(kind: str, content: bytes) -> str:
    with TemporaryDirectory() as folder:
        path = READERS[kind].at(Path(folder))
        path.write_bytes(content)
        before = time.process_time()  # not of the clock: other work on the machine is no fault of a reader
        message = try_reading(kind, path)
        assert time.process_time() - before < SECONDS
        return message


@pytest.mark.parametrize("kind", sorted(READERS))
def test_damaged_files(kind):
    fuzz(kind)()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_files_at_which_a_reader_failed(path):
    read(path.name.partition("-")[0], path.read_bytes())
