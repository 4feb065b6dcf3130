"""Measures how fast this machine fetches expert records, and how fast its device reads weights."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.store.direct_io import open_direct, read_full, write_full
from vllm_adapmoe.store.folder import packs_root
from vllm_adapmoe.store.record import aligned_empty

ROUNDS = 5
COPY_BYTES = 1 << 28
"""Minimum bytes moved per round."""
RECORDS = 4
"""Minimum records read or copied per round."""
WEIGHT_BYTES = 1 << 28
"""Size of the tensor read by `measure_weights`, larger than processor caches."""


def measure_link(record_bytes: int, store_dir: Path | None = None) -> tuple[float, str]:
    """Returns bytes per second of moving records of a size one after another, and a description of the measurement.

    With a CUDA device it measures copies from page-locked host memory; on the CPU, direct reads of a temporary file on
    the disk of the packed files.

    Raises:
        AdapMoEError: the disk has no room for the temporary file, or is not writable.
    """
    if torch.cuda.is_available():
        return measure_copies(record_bytes), f"copies to {torch.cuda.get_device_name()} from page-locked memory"
    return measure_disk(record_bytes, store_dir)


def measure_disk(record_bytes: int, store_dir: Path | None = None) -> tuple[float, str]:
    """Returns bytes per second of direct reads of records of a size one after another, and a description.

    Raises:
        AdapMoEError: the disk has no room for the temporary file, or is not writable.
    """
    folder = packs_root(store_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return measure_reads(record_bytes, existing), "direct reads from the disk of the packed files"


def measure_copies(record_bytes: int) -> float:
    """Measures bytes per second of copies from page-locked memory to the CUDA device."""
    count = max(RECORDS, COPY_BYTES // record_bytes)
    source = aligned_empty(record_bytes, pin=True)
    destination = torch.empty(record_bytes, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        for _ in range(count):
            destination.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return count * record_bytes / _seconds(copy, "Copying to the device")


def measure_reads(record_bytes: int, folder: Path) -> float:
    """Measures bytes per second of direct reads of a temporary file in `folder`.

    Raises:
        AdapMoEError: no room for the file, or it cannot be written.
    """
    count = max(RECORDS, COPY_BYTES // record_bytes)
    nbytes = count * record_bytes
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise AdapMoEError(
            f"measuring the disk writes {nbytes} bytes to {folder}, {free} are free; set --link or --disk (GB/s), or "
            "--store-dir"
        )
    buffer = aligned_empty(record_bytes).random_()
    try:
        with TemporaryDirectory(dir=folder, prefix="adapmoe-link-") as temporary:
            path = Path(temporary) / "records"
            fd, _ = open_direct(path, os.O_RDWR | os.O_CREAT)
            try:
                for number in tqdm(range(count), desc="Writing records", unit="record"):
                    write_full(fd, buffer, number * record_bytes)
                os.fsync(fd)

                def read() -> None:
                    for number in range(count):
                        read_full(fd, [buffer], number * record_bytes)

                return nbytes / _seconds(read, "Reading records")
            finally:
                os.close(fd)
    except OSError as error:
        raise AdapMoEError(
            f"the disk cannot be measured in {folder} ({error.strerror}); set --link or --disk (GB/s), or --store-dir"
        ) from None


def measure_weights() -> tuple[float, str]:
    """Returns bytes per second at which the device reads its memory, and a description of the measurement."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.ones(WEIGHT_BYTES // 4, device=device)

    def read() -> None:
        weights.sum().item()

    name = torch.cuda.get_device_name() if device == "cuda" else f"this CPU with {torch.get_num_threads()} threads"
    return WEIGHT_BYTES / _seconds(read, "Reading memory"), f"a sum over {WEIGHT_BYTES >> 20} MiB by {name}"


def _seconds(action: Callable[[], None], name: str) -> float:
    """Returns the median time of `ROUNDS` runs, after a warm-up run."""
    action()
    seconds = []
    for _ in tqdm(range(ROUNDS), desc=name, unit="round"):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
