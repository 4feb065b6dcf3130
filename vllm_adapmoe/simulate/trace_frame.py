"""Decodes a frame of a trace: checks that its arrays fit each other and the model, and yields its steps."""

import re
import zlib
from collections.abc import Iterator

import numpy as np

from vllm_adapmoe.files import HEADER_BYTES, BadFile, parse_arrays, parse_json
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.simulate.trace import FRAME_BYTES, FRAME_STEPS, Step, TraceInfo

NAMES = 1 << 20
"""Maximum number of request names in a frame."""
REQUIRED = frozenset(("seconds", "rows", "names", "requests", "positions", "ids", "weights"))
OPTIONAL = re.compile(
    r"foretold\.(-1|[0-9]{1,4})\.([0-9]{1,4})\.(rows|ids|kept)|expected\.([0-9]{1,4})(?:\.of)?|begin(?:\.of)?|drafted"
)

Frame = dict[str, np.ndarray]


def read_frame(data: bytes, info: TraceInfo) -> Iterator[Step]:
    """Returns the steps of a frame, after checking all of it.

    Raises:
        BadFile: the frame is damaged, too large, or of another model.
    """
    return _steps(_checked(parse_arrays(_inflate(data)), info))


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        # Checks the length of the header before it inflates all: a megabyte may inflate to gigabytes.
        if not 2 <= int.from_bytes(zlib.decompressobj().decompress(data, 8), "little") <= HEADER_BYTES:
            raise BadFile("is damaged (no arrays)")
        arrays = inflater.decompress(data, FRAME_BYTES + 1)
    except zlib.error as error:
        raise BadFile(f"is damaged ({error})") from None
    if len(arrays) > FRAME_BYTES:
        raise BadFile(f"has more than {FRAME_BYTES} bytes of arrays")
    if not inflater.eof or inflater.unused_data:
        raise BadFile("is damaged (its compressed data is incomplete, or more follows)")
    return arrays


def _checked(arrays: Frame, info: TraceInfo) -> Frame:
    """Checks that the arrays of a frame fit each other and the model, and returns them.

    Raises:
        BadFile: they do not fit.
    """
    layers, max_experts = len(info.num_experts), max(info.num_experts)

    def check_range(name: str, array: np.ndarray, minimum: int, end: int) -> None:
        if array.size and not (int(array.min()) >= minimum and int(array.max()) < end):
            raise BadFile(f"has {name!r} from {array.min()} to {array.max()}, not from {minimum} to {end - 1}")

    def check_chances(name: str, array: np.ndarray, experts: range) -> None:
        if array.shape[1] not in experts:
            raise BadFile(f"has an array {name!r} of {array.shape[1]} experts, of {max_experts} at most")
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise BadFile(f"has {name!r} from {array.min()} to {array.max()}, not from 0 to 1")

    def checked(name: str, kinds: str, *shape: int) -> np.ndarray:
        """Returns an array after checking its kind (one of numpy's letters in `kinds`) and its shape; -1: any."""
        array = arrays.get(name)
        if array is None:
            raise BadFile(f"has no array {name!r}")
        fits = array.ndim == len(shape) and all(
            expected_size in (-1, size) for expected_size, size in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype.kind not in kinds:
            raise BadFile(f"has an array {name!r} that is {array.dtype} {list(array.shape)}")
        if kinds == "b":
            check_range(name, array.view(np.uint8), 0, 2)  # numpy does not reject other bytes
        return array

    rows = checked("rows", "i", -1)
    check_range("rows", rows, 1, 1 << 31)
    steps, total = len(rows), int(rows.sum(dtype=np.int64))
    if steps > FRAME_STEPS:
        raise BadFile(f"has {steps} steps, of {FRAME_STEPS} at most")
    if not np.isfinite(checked("seconds", "f", steps)).all():
        raise BadFile("has times that are not finite")
    names = parse_json(checked("names", "u", -1).tobytes(), NAMES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadFile("has names that are not a list of strings")
    check_range("requests", checked("requests", "i", total), 0, len(names))
    check_range("positions", checked("positions", "i", total), 0, 1 << 31)
    for number, ids in enumerate(checked("ids", "u", layers, total, info.top_k)):
        check_range(f"ids of layer {number}", ids, 0, info.num_experts[number])
    checked("weights", "f", layers, total, info.top_k)
    for name in sorted(arrays.keys() - REQUIRED):
        match = OPTIONAL.fullmatch(name)
        if match is None:
            raise BadFile(f"has an unknown array {name!r}")
        layer, distance, part, expected = match.group(1, 2, 3, 4)
        if part == "rows":
            target = int(layer) + int(distance)
            if not 0 <= target < layers or int(distance) < 1:
                raise BadFile(f"has an array {name!r} of a layer that the model lacks")
            prefix = name.removesuffix(".rows")
            rows_of_step = checked(name, "i", steps)
            check_range(name, rows_of_step, -1, 1 << 31)
            count = int(rows_of_step[rows_of_step > 0].sum(dtype=np.int64))
            ids = checked(f"{prefix}.ids", "u", count, -1)
            check_range(prefix, ids, 0, info.num_experts[target])
            if not 1 <= ids.shape[1] <= info.top_k:
                raise BadFile(f"has an array {prefix!r} of {ids.shape[1]} experts of a token, of {info.top_k} at most")
            checked(f"{prefix}.kept", "b", *ids.shape)
        elif part is not None:
            checked(f"foretold.{layer}.{distance}.rows", "i", steps)
        elif expected is not None:
            if int(expected) >= layers:
                raise BadFile(f"has an array {name!r} of a layer that the model lacks")
            has_chances = checked(f"expected.{expected}.of", "b", steps)
            check_chances(
                name, checked(f"expected.{expected}", "f", int(has_chances.sum()), -1), range(1, max_experts + 1)
            )
        elif name == "drafted":
            checked(name, "b", total)
        else:
            has_chances = checked("begin.of", "b", steps)
            begin = checked("begin", "f", int(has_chances.sum()), -1, max_experts)
            check_chances(name, begin.reshape(-1, max_experts), range(max_experts, max_experts + 1))
            if begin.shape[1] > layers:
                raise BadFile(f"has an array {name!r} of {begin.shape[1]} layers, of {layers} at most")
    return arrays


def _steps(arrays: Frame) -> Iterator[Step]:
    """Yields the steps of a checked frame."""
    names = parse_json(arrays["names"].tobytes(), NAMES)
    predicted: list[dict[tuple[int, int], PredictedExperts]] = [{} for _ in arrays["rows"]]
    for name in arrays:
        if name.startswith("foretold.") and name.endswith(".rows"):
            prefix = name.removesuffix(".rows")
            _, layer, distance = prefix.split(".")
            start = 0
            for number, rows in enumerate(arrays[name].tolist()):
                if rows >= 0:
                    tensors = [arrays[f"{prefix}.{part}"][start : start + rows] for part in ("ids", "kept")]
                    predicted[number][int(layer), int(distance)] = PredictedExperts(tensors[0], tensors[1])
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
        step_rows = slice(start, start + rows)
        start += rows
        yield Step(
            seconds=float(arrays["seconds"][number]),
            requests=[names[index] for index in arrays["requests"][step_rows].tolist()],
            positions=arrays["positions"][step_rows],
            ids=arrays["ids"][:, step_rows],
            weights=arrays["weights"][:, step_rows],
            predicted=predicted[number],
            expected=expected[number],
            begin=begin[number],
            drafted=arrays["drafted"][step_rows] if "drafted" in arrays else None,
        )
