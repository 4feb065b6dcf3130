"""Writes what is generated into a document, between its markers."""

from pathlib import Path


def write_between(document: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between `begin` and `end` in `document`."""
    before, _, rest = document.read_text().partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
