"""Reading of files that anybody may have made: packs, profiles, heads, traces and configurations.

Folders of models are shared. Whatever lies in the place of a file, opening it does not block, reading it takes no more
memory than a file of that kind may take, and what is wrong is said in a few words: `BadFile`. The reader that asked
puts the file's name before them and the remedy behind.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

KEYS = 256
"""Of one JSON object; ours have some twenty."""
DIGITS = 19
"""Of an integer: it fits 64 bits."""
HEADER_BYTES = 4 << 20
"""Of the JSON in front of arrays, some 40,000 of them."""


class BadFile(ValueError):
    """What is wrong with a file, without its name: `cannot be read (Permission denied)`, `is not valid JSON (..)`."""


class NoFile(BadFile):
    """There is no file of that name."""


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; returns its descriptor.

    A pipe in its place would block an open for ever, and a device would give bytes without end.

    Raises:
        OSError: as the system says, or that it is no regular file.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    except ValueError:  # a NUL, or half of a surrogate pair
        raise OSError(errno.ENXIO, "not a name that a file can have") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, "not a regular file")
    except OSError:
        os.close(fd)
        raise
    return fd


def open_binary(path: str | Path) -> io.BufferedReader:
    """Opens a regular file for reading.

    Raises:
        BadFile: it cannot be.
    """
    try:
        return io.BufferedReader(io.FileIO(open_regular(path)))
    except FileNotFoundError as error:
        raise NoFile(f"cannot be read ({error.strerror})") from None
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from None


def read_bytes(path: str | Path, most: int) -> bytes:
    """Returns what is in a regular file of at most `most` bytes.

    Raises:
        BadFile: it cannot be read, or is larger.
    """
    try:
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= most:
                data = file.read(size + 1)
                if len(data) > size:
                    raise BadFile("grows while it is read")
                return data
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from None
    raise BadFile(f"has {size} bytes, more than the {most} that a file of its kind may have")


def read_text(path: str | Path, most: int) -> str:
    """Returns the text of a file of at most `most` bytes; what is not UTF-8 in it is replaced.

    Raises:
        BadFile: as `read_bytes`.
    """
    return read_bytes(path, most).decode(errors="replace")


def read_json(path: str | Path, most: int, values: int) -> Any:
    """Returns what a JSON file of at most `most` bytes holds: `parse_json`.

    Raises:
        BadFile: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, most), values)


def parse_json(data: bytes | str, values: int, strict: bool = True) -> Any:
    """Parses JSON of at most `values` values.

    Args:
        data: UTF-8.
        values: of lists and objects, however deep.
        strict: no key is given twice, integers fit 64 bits, floats are finite. What others write is not always so:
            models have `Infinity` in their configurations.

    Raises:
        BadFile: it is not that.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # Each value but the first of a list or an object stands behind a comma; a short text may take megabytes parsed.
        if text.count(",") > values:
            raise BadFile(f"has more than the {values} values that a file of its kind may have")
        if not strict:
            return json.loads(text)
        return json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_no_number, object_pairs_hook=_object
        )
    except BadFile:
        raise
    except UnicodeDecodeError:
        raise BadFile("is not UTF-8 text") from None
    except RecursionError:
        raise BadFile("is not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise BadFile(f"is not valid JSON ({error})") from None


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS or not -(2**63) <= int(text) < 2**63:
        raise BadFile(f"is not usable: {text[:DIGITS]}.. is too large a number")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BadFile(f"is not usable: {text[:DIGITS]} is too large a number")
    return value


def _no_number(text: str) -> NoReturn:
    raise BadFile(f"is not valid JSON ({text} is no number)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS:
        raise BadFile(f"is not usable: an object of {len(pairs)} keys, of {KEYS} at most")
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise BadFile(f"gives the key {key!r} twice")
        made[key] = value
    return made


def parse_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors container, which take no more memory than `data` itself.

    Raises:
        BadFile: it is none, or has arrays of types that numpy does not know.
    """
    if int.from_bytes(data[:8], "little") > HEADER_BYTES:
        raise BadFile("is damaged (its header is too large)")
    try:
        return load(data)
    except KeyError as error:
        raise BadFile(f"is damaged (arrays of type {error})") from None
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise BadFile(f"is damaged ({error})") from None
