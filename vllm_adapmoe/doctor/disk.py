"""Checks the folder for packed files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.doctor.finding import Finding, Level
from vllm_adapmoe.planning.link import measure_reads
from vllm_adapmoe.store.direct_io import open_direct, read_full, write_full
from vllm_adapmoe.store.folder import packs_root
from vllm_adapmoe.store.record import ALIGNMENT, aligned_empty
from vllm_adapmoe.units import GiB

SECTION = "Disk of the packed files"
RECORD_BYTES = 3 << 20
SLOW = 0.5e9
"""Bytes per second below which fetching is likely to dominate the time per token."""


def check_disk(store_dir: Path | None, needed: bool) -> Iterator[Finding]:
    """Checks that experts can be packed in the folder and read without the page cache, and measures how fast.

    Args:
        store_dir: as in `adapmoe_config`; None: vLLM's cache.
        needed: packed files are the default on this device; if not, a fault is a note unless `store_dir` is set.
    """
    folder = packs_root(store_dir)
    fault: Level = "problem" if needed or store_dir is not None else "note"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    remedy = "name another folder with --store-dir, and as store_dir in adapmoe_config"
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix="adapmoe-doctor-") as temporary:
            direct = _reads_directly(Path(temporary) / "block")
    except OSError as error:
        yield Finding(
            SECTION, fault, f"{folder} cannot be written ({error.strerror})", remedy,
            fails="packed files (store=file): the folder cannot be written",
        )  # fmt: skip
        return
    free = shutil.disk_usage(existing).free
    exists = "" if folder == existing else f", to be created in {existing}"
    yield Finding(SECTION, "ok", f"{folder}{exists}: writable, {free / GiB:.1f} GiB free")
    if direct:
        yield Finding(SECTION, "ok", "direct I/O works")
    else:
        yield Finding(
            SECTION, "note", "no direct I/O: experts are read through the page cache, which is dropped after each read",
            "use a file system that has it, such as ext4 or xfs on a local disk",
            fails="reading experts without the page cache (no direct I/O in this folder)",
        )  # fmt: skip
    try:
        bandwidth = measure_reads(RECORD_BYTES, existing)
    except AdapMoEError:
        yield Finding(SECTION, fault, f"no room to measure: {free / GiB:.2f} GiB free", remedy)
        return
    how = "direct reads" if direct else "reads, perhaps from memory"
    text = f"{bandwidth / 1e9:.2f} GB/s in {how} of 3 MiB"
    yield Finding(
        SECTION, "ok" if bandwidth >= SLOW else "note", text,
        "" if bandwidth >= SLOW else "fetching will dominate the time per token; use a local NVMe disk",
        works=f"experts in packed files, fetched at {bandwidth / 1e9:.2f} GB/s (store=file)",
    )  # fmt: skip


def _reads_directly(path: Path) -> bool:
    """Writes a block and reads it back; returns whether direct I/O was used.

    Raises:
        OSError: writing or reading failed.
    """
    block = aligned_empty(ALIGNMENT).fill_(7)
    fd, direct = open_direct(path, os.O_RDWR | os.O_CREAT)
    try:
        write_full(fd, block, 0)
        read_full(fd, [block], 0)
    finally:
        os.close(fd)
    return direct
