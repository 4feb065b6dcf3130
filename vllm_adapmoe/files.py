"""Reads untrusted files: packs, profiles, heads, traces and configurations.

Model folders are shared. Opening a path never blocks, and reading a file takes no more memory than the limit for its
kind. The message of `BadFile` is the middle of a sentence: the caller adds the file's name before it and the remedy
after it.
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
"""Maximum keys of one JSON object; ours have some twenty."""
DIGITS = 19
"""Maximum digits of an integer that fits 64 bits."""
HEADER_BYTES = 4 << 20
"""Maximum bytes of a safetensors header: some 40,000 arrays."""


class BadFile(ValueError):
    """A problem with a file, without its name: `cannot be read (Permission denied)`, `is not valid JSON (..)`."""


class NoFile(BadFile):
    """A file that does not exist."""


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; returns its descriptor.

    Opening a pipe would block forever, and a device could return bytes without end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
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
        BadFile: it cannot be opened.
    """
    try:
        return io.BufferedReader(io.FileIO(open_regular(path)))
    except FileNotFoundError as error:
        raise NoFile(f"cannot be read ({error.strerror})") from None
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from None


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `most` bytes.

    Raises:
        BadFile: it cannot be read, or is larger.
    """
    try:
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= max_bytes:
                data = file.read(size + 1)
                if len(data) > size:
                    raise BadFile("grows while it is read")
                return data
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from None
    raise BadFile(f"has {size} bytes, more than the maximum of {max_bytes} for this kind of file")


def read_text(path: str | Path, max_bytes: int) -> str:
    """Returns the text of a file of at most `most` bytes; invalid UTF-8 is replaced.

    Raises:
        BadFile: as `read_bytes`.
    """
    return read_bytes(path, max_bytes).decode(errors="replace")


def read_json(path: str | Path, max_bytes: int, values: int) -> Any:
    """Parses a JSON file of at most `most` bytes (`parse_json`).

    Raises:
        BadFile: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, max_bytes), values)


def parse_json(data: bytes | str, values: int, strict: bool = True) -> Any:
    """Parses JSON of at most `values` values.

    Args:
        data: JSON text, UTF-8 if bytes.
        values: maximum number of values in lists and objects, at any depth.
        strict: refuse duplicate keys, integers beyond 64 bits, and floats that are not finite. False for files of other
            programs: some models have `Infinity` in their configurations.

    Raises:
        BadFile: invalid JSON, or beyond these limits.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # Every value but the first of a list or object follows a comma. Parsed, a short text may take megabytes.
        if text.count(",") > values:
            raise BadFile(f"has more than {values} values, the maximum for this kind of file")
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
        raise BadFile(f"is not usable: an object of {len(pairs)} keys, more than the maximum of {KEYS}")
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise BadFile(f"has the key {key!r} twice")
        made[key] = value
    return made


def parse_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors container, which take no more memory than `data` itself.

    Raises:
        BadFile: not a safetensors container, or arrays of types that numpy does not support.
    """
    if int.from_bytes(data[:8], "little") > HEADER_BYTES:
        raise BadFile("is damaged (its header is too large)")
    try:
        return load(data)
    except KeyError as error:
        raise BadFile(f"is damaged (arrays of type {error})") from None
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise BadFile(f"is damaged ({error})") from None
