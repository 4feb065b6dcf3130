"""Frames of a trace that check out and cannot be: each is refused for what is wrong with it."""

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from readers import EXPERTS, INFO, LAYERS, frame_of, trace_steps, try_reading
from safetensors.numpy import save

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.simulate.trace import TraceWriter, _frame
from vllm_adapmoe.simulate.trace_file import read_trace

Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Arrays) -> None:
    line = json.dumps(asdict(INFO)).encode() + b"\n"
    path.write_bytes(line + frame_of(save({name: np.ascontiguousarray(array) for name, array in arrays.items()})))


def put(name: str, value: object) -> Callable[[Arrays], object]:
    """Puts a value where an array begins."""
    return lambda arrays: arrays[name].reshape(-1).__setitem__(0, value)


def put_byte(name: str, value: int) -> Callable[[Arrays], object]:
    return lambda arrays: arrays[name].reshape(-1).view(np.uint8).__setitem__(0, value)


def replace(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


def rename(name: str, other: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.__setitem__(other, arrays.pop(name))


def text(value: object) -> Callable[[np.ndarray], np.ndarray]:
    return lambda _: np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


DAMAGE = {
    "an expert": (put("ids", EXPERTS), "ids of layer 0"),
    "a request": (put("requests", 99), "'requests'"),
    "a request below": (put("requests", -1), "'requests'"),
    "a position": (put("positions", -1), "'positions'"),
    "no rows": (put("rows", 0), "'rows'"),
    "fewer rows": (put("rows", -1), "'rows'"),
    "more rows": (put("rows", 5), "an array"),
    "many rows": (put("rows", 2**31 - 1), "an array"),
    "no time": (put("seconds", np.nan), "times that are not finite"),
    "names": (replace("names", text({"a": 1})), "names"),
    "names of numbers": (replace("names", text([1, 2, 3])), "names"),
    "few names": (replace("names", text(["a"])), "'requests'"),
    "no JSON": (put_byte("names", 0), "not valid JSON"),
    "weights": (replace("weights", lambda array: array[:, :, :1]), "'weights'"),
    "a type": (replace("ids", lambda array: array.astype(np.float32)), "'ids'"),
    "layers": (replace("ids", lambda array: array[:2]), "'ids'"),
    "nothing": (lambda arrays: arrays.pop("positions"), "no array 'positions'"),
    "foretold expert": (put("foretold.0.1.ids", EXPERTS), "foretold.0.1"),
    "foretold rows": (put("foretold.0.1.rows", -2), "foretold.0.1.rows"),
    "more foretold rows": (put("foretold.0.1.rows", 9), "foretold.0.1.ids"),
    "foretold layer": (lambda arrays: [rename(f"foretold.1.1.{part}", f"foretold.2.1.{part}")(arrays)
                                       for part in ("rows", "ids", "kept")], "layer that the model lacks"),
    "foretold alone": (lambda arrays: arrays.pop("foretold.0.1.rows"), "foretold.0.1.rows"),
    "foretold of none": (replace("foretold.0.1.ids", lambda array: array[:, :0]), "foretold.0.1"),
    "kept": (lambda arrays: arrays.pop("foretold.0.1.kept"), "foretold.0.1.kept"),
    "kept and a half": (put_byte("foretold.0.1.kept", 2), "foretold.0.1.kept"),
    "an expected chance": (put("expected.0", np.nan), "not from 0 to 1"),
    "a sure chance": (put("expected.0", 2), "not from 0 to 1"),
    "expected experts": (replace("expected.0", lambda array: np.repeat(array, 2, 1)), "expected.0"),
    "expected of 3 steps": (replace("expected.0", lambda array: array[:3]), "expected.0"),
    "expected by half": (put_byte("expected.0.of", 255), "expected.0.of"),
    "expected layer": (lambda arrays: [rename(f"expected.2{part}", f"expected.{LAYERS}{part}")(arrays)
                                       for part in ("", ".of")], "layer that the model lacks"),
    "expected alone": (lambda arrays: arrays.pop("expected.0.of"), "expected.0.of"),
    "begun layers": (replace("begin", lambda array: np.repeat(array, 2, 1)), "of 4 layers"),
    "begun experts": (replace("begin", lambda array: array[:, :, :3]), "'begin'"),
    "a begun chance": (put("begin", -1), "not from 0 to 1"),
    "begun alone": (lambda arrays: arrays.pop("begin"), "no array 'begin'"),
    "another array": (rename("expected.0", "x\n\x1b[31m"), "expected.0"),
    "an array more": (lambda arrays: arrays.__setitem__("x\n", arrays["rows"]), "has an unknown array"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_frame_that_cannot_be(name, tmp_path):
    damage, said = DAMAGE[name]
    arrays = {key: array.copy() for key, array in _frame(trace_steps(), INFO).items()}
    write(tmp_path / "trace", arrays)
    assert try_reading("trace", tmp_path / "trace") == ""
    damage(arrays)
    write(tmp_path / "trace", arrays)
    message = try_reading("trace", tmp_path / "trace")
    assert said in message and "the frame at byte" in message


def test_too_many_steps_in_a_frame(tmp_path):
    write(tmp_path / "trace", _frame(trace_steps() * 11, INFO))
    assert "has 66 steps, of 64 at most" in try_reading("trace", tmp_path / "trace")


def write_frames(path: Path, count: int) -> None:
    writer = TraceWriter(path, INFO, 1 << 40)
    step = trace_steps()[0]
    for _ in range(64 * count):
        writer.add(step)
    writer.close()


def test_a_trace_larger_than_memory_is_read_a_frame_at_a_time(tmp_path):
    path, peaks = tmp_path / "trace", []
    for count in (4, 40):
        write_frames(path, count)
        tracemalloc.start()
        assert sum(1 for _ in read_trace(path)[1]) == 64 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    _, steps = read_trace(path)
    assert len(steps) == 64 * 40
    first = iter(steps)
    assert next(first) is not next(iter(steps)), "each pass reads anew"
    path.rename(path.with_name("elsewhere"))  # what was opened stays that
    assert sum(1 for _ in steps) == len(steps)
    os.truncate(path.with_name("elsewhere"), 5000)
    with pytest.raises(AdapMoEError, match="was cut short while it was read"):
        list(steps)


def test_damage_in_the_middle_is_told_and_a_cut_end_is_left_out(tmp_path, caplog):
    path = tmp_path / "trace"
    line = json.dumps(asdict(INFO)).encode() + b"\n"
    frame = frame_of(save(_frame(trace_steps(), INFO)))
    path.write_bytes(line + frame * 2)
    whole = len(read_trace(path)[1])
    path.write_bytes(line + frame + frame[:-1])
    with caplog.at_level("WARNING"):
        assert len(read_trace(path)[1]) == whole // 2
    assert f"the last {len(frame) - 1} bytes are an incomplete frame" in caplog.text
    damaged = bytearray(frame)
    damaged[len(frame) // 2] ^= 1
    path.write_bytes(line + frame + damaged + frame)
    at = len(line) + len(frame)
    with pytest.raises(AdapMoEError, match=f"the frame at byte {at} .* truncate --size={at}"):
        read_trace(path)
    os.truncate(path, at)
    assert len(read_trace(path)[1]) == whole // 2
