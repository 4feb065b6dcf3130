"""Text that any Python machine has: the standard library, installed packages and their documentation."""

import hashlib
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOMAINS: dict[str, tuple[str, ...]] = {
    "python": (".py",),
    "prose": (".md", ".rst", ".txt", "METADATA"),
    "headers": (".h", ".hpp", ".cuh"),
    "data": (".json", ".yaml", ".yml", ".toml", ".pyi"),
}
CHARACTERS: dict[str, int] = {"python": 16_000_000, "prose": 4_000_000, "headers": 4_000_000, "data": 2_000_000}
"""How much of each domain is read for training; held-out text is read in a tenth of it."""
HELD_OUT_SHARE = 16
"""One file in so many, by the hash of its path, is never trained on."""
SKIPPED_WORDS = ("license", "licence", "copying", "notice", "record", "vocab", "tests/data", "top_level")


def _roots() -> list[Path]:
    return [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _files(domain: str) -> Iterator[tuple[str, Path]]:
    """Files of a domain with their names below their root, in the order of the names' hashes."""
    paths: dict[str, Path] = {}
    for root in _roots():
        for suffix in DOMAINS[domain]:
            for path in root.rglob(f"*{suffix}"):
                name = path.relative_to(root).as_posix()
                if name.startswith("site-packages/") or any(word in name.lower() for word in SKIPPED_WORDS):
                    continue
                paths.setdefault(name, path)
    yield from sorted(paths.items(), key=lambda item: _hash(item[0]))


def documents(domain: str, held_out: bool) -> Iterator[tuple[str, str]]:
    """(name, text) of files of one side of the split, until the domain's share of characters is reached."""
    remaining = CHARACTERS[domain] // (10 if held_out else 1)
    seen: set[int] = set()
    for name, path in _files(domain):
        if (_hash("split:" + name) % HELD_OUT_SHARE == 0) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        text = text[:40_000]
        if len(text) < 400 or _hash(text) in seen:
            continue
        seen.add(_hash(text))
        yield name, text
        remaining -= len(text)
        if remaining <= 0:
            return
