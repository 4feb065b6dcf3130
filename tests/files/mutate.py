"""Damage to files, as strategies: to their bytes, to JSON and to arrays in them."""

import json
from copy import deepcopy
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

RAW = {  # what json.dumps would not write
    "raw:huge": "9" * 5000,
    "raw:big": "9" * 40,
    "raw:inf": "1e400",
    "raw:nan": "NaN",
    "raw:infinity": "-Infinity",
    "raw:deep": "[" * 5000 + "]" * 5000,
    "raw:twice": '{"a": 1, "a": 2}',
    "raw:cut": '{"a": [1, 2',
}
VALUES: list[Any] = [
    *RAW, 0, 1, -1, 2, 3, 255, 256, 1025, 65_537, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 0.0, -0.0, 0.5, 1.5, -1e-9,
    5e-324, 1e-30, 1e30, 1e308, True, False, None, "", "x", "\x1b[2Jforged\nline", "a\0b", "\ud800", "x" * 70_000, [],
    {}, [[]], [0] * 2000, {"": {}}, "float32", "bfloat16", "float4_e2m1fn_x2", "Tensor", "__class__", "../../x",
]  # fmt: skip
INTEGERS = [0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A few edits of the bytes."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        match draw(st.sampled_from(("flip", "set", "cut", "drop", "insert", "repeat", "number"))):
            case "flip" if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if out:
                out[at] = draw(st.integers(0, 255))
            case "cut":
                del out[at:]
            case "drop":
                del out[at : at + draw(st.integers(1, 64))]
            case "insert":
                out[at:at] = draw(st.binary(max_size=32))
            case "repeat":
                out[at:at] = out[at : at + draw(st.integers(1, 512))] * draw(st.integers(1, 20))
            case "number":
                size = draw(st.sampled_from((4, 8)))
                number = draw(st.sampled_from(INTEGERS)) % 2 ** (8 * size)
                out[at : at + size] = number.to_bytes(size, "little")
    return bytes(out)


def encode(value: Any) -> bytes:
    """JSON, in which the keys of `RAW` stand for what it has."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode(errors="surrogatepass")


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON value, some of whose parts are others."""
    box = {"": json.loads(json.dumps(value))}
    for _ in range(draw(st.integers(1, 3))):
        parent, key = box, ""
        while True:  # down a random path
            here = parent[key]
            keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
            if not keys or draw(st.integers(0, 4)) == 0:
                break
            parent, key = here, draw(st.sampled_from(keys))
        match draw(st.sampled_from(("set", "set", "drop", "add", "repeat", "swap"))):
            case "drop" if parent is not box:
                del parent[key]
            case "add" if isinstance(parent[key], dict):
                parent[key][draw(st.sampled_from(("x", "", "format", "\n", *map(str, range(3)))))] = 1
            case "repeat" if isinstance(parent[key], list):
                parent[key] *= draw(st.integers(2, 300))
            case "swap" if isinstance(parent, dict) and len(parent) > 1:
                other = draw(st.sampled_from(sorted(parent)))
                parent[key], parent[other] = parent[other], parent[key]
            case _:
                parent[key] = deepcopy(draw(st.sampled_from(VALUES)))
    return encode(box[""])


def container(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def damaged_arrays(draw: st.DrawFn, arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors container, some of whose arrays are others, or whose header is damaged."""
    made = {name: array.copy() for name, array in arrays.items()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(made)))
        array = made[name]
        match draw(st.sampled_from(("values", "values", "number", "type", "shape", "drop", "rename", "add", "rows"))):
            case "values" if array.size:
                flat = array.reshape(-1).view(np.uint8)
                for _ in range(draw(st.integers(1, 8))):
                    flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from((0, 1, 2, 7, 127, 128, 252, 255)))
            case "number" if array.size:
                with np.errstate(all="ignore"):
                    number = np.array(draw(st.sampled_from((-2, -1, 0, 1, 2, 4, 5, 8, 300, np.inf, np.nan))))
                    array.reshape(-1)[draw(st.integers(0, array.size - 1))] = number.astype(array.dtype)
            case "type":
                kind = draw(st.sampled_from((np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float64, bool)))
                with np.errstate(all="ignore"):
                    made[name] = array.astype(kind)
            case "shape":
                made[name] = array.reshape(draw(st.sampled_from(((-1,), (1, -1), (*array.shape, 1)))))
            case "drop" if len(made) > 1:
                del made[name]
            case "rename":
                other = draw(st.sampled_from((*sorted(made), "x", name + ".rows", "foretold.9.9.rows", "layer.99")))
                made[other] = made.pop(name)
            case "add":
                made[draw(st.sampled_from(("x", "begin", "expected.0", "layer.0\n", "foretold.-1.1.rows")))] = array
            case "rows" if array.ndim:
                made[name] = np.concatenate([array] * draw(st.integers(0, 3)) or [array[:0]])
    data = save({name: np.ascontiguousarray(array) for name, array in made.items()})
    if draw(st.integers(0, 7)):
        return data
    size = int.from_bytes(data[:8], "little")
    return container(draw(damaged_json(json.loads(data[8 : 8 + size]))), data[8 + size :])
