"""Byte units, and parsing of sizes such as `24GiB`."""

import re

from vllm_adapmoe.printable import OneLineError

MiB, GiB = 1 << 20, 1 << 30
UNITS = {"GiB": GiB, "MiB": MiB, "GB": 10**9, "MB": 10**6}


def parse_bytes(option: str, text: str) -> int:
    """Parses a size such as `24GiB`, `512 MiB`, `2.5GB` or `512mb`; returns bytes.

    Args:
        option: name of the option, for the error message.

    Raises:
        OneLineError: not such a size.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?([a-z]+)", text.strip(), re.IGNORECASE | re.ASCII)
    size = None if match is None else {unit.lower(): size for unit, size in UNITS.items()}.get(match[2].lower())
    if match is None or size is None or len(match[1]) > 9:
        raise OneLineError(f"{option}={text!r} is not a size; write 24GiB, 512MiB, 24GB or 512MB")
    return int(float(match[1]) * size)
