"""Measures the disk bandwidth of the transfer engine against plain sequential reads of the same records."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.results import rotated, spread
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import open_direct, read_full
from vllm_adapmoe.store.file import FileStore, open_pack
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import ALIGNMENT, align, as_bytes
from vllm_adapmoe.units import MiB

EXPERTS = 8
"""Experts per layer of a synthetic pack."""
LAYERS = 4
"""Minimum layers of a synthetic pack, so that the slots never hold every record."""
SLOTS = 16
"""Minimum slots of the engine; with fewer records than slots nothing would be read."""
PLAIN_THREADS = (1, 2, 4)
TOGETHER = (1, 2, 4, 8)
"""Numbers of experts requested per event."""
AHEAD = 2
"""Maximum prefetches in flight."""
BASE = "plain, 1 reader"


def run_transfer(
    model: Path | None, record_mib: Sequence[float], store_dir: Path | None, rounds: int, pass_mib: int
) -> dict[str, Any]:
    """Reads every record of a pack with every method in turn; the order rotates by one each round.

    Args:
        model: checkpoint folder whose pack is read; None: synthetic packs of random bytes.
        record_mib: record sizes of the synthetic packs, MiB.
        store_dir: folder for packs; None: vLLM's cache for a model, a temporary folder for synthetic packs.
        rounds: measurements of every method.
        pass_mib: minimum size of a synthetic pack, MiB, and so of one pass over it; `LAYERS` may require more.

    Raises:
        AdapMoEError: the pack cannot be written.
    """
    if any(mib <= 0 for mib in record_mib):
        raise AdapMoEError(f"--record-mib {min(record_mib):g} is not usable; more than 0, e.g. 24")
    if model is not None:
        results = [_measure(_model_pack(model, store_dir), rounds)]
    else:
        results = []
        for mib in record_mib:
            with TemporaryDirectory(dir=store_dir, prefix="adapmoe-transfer-") as folder:
                path = Path(folder) / "experts.pack"
                synthetic_pack(path, round(mib * MiB), round(pass_mib * MiB))
                results.append(_measure(path, rounds))
    return {"benchmark": "transfer", "model": None if model is None else str(model), "rounds": rounds, "packs": results}


def _model_pack(model: Path, store_dir: Path | None) -> Path:
    from vllm_adapmoe.integration.loading.packing import pack_experts

    folder = pack_experts(str(model), None if store_dir is None else str(store_dir))
    return next(folder.glob("*.pack"))


def synthetic_pack(path: Path, record_bytes: int, total_bytes: int) -> None:
    """Writes a pack of random bytes: records of two pieces, 2 to 1, like experts with a gated activation.

    Raises:
        AdapMoEError: the pack cannot be written.
    """
    down = align(record_bytes // 3)
    up = max(align(record_bytes) - down, ALIGNMENT)
    layers = max(LAYERS, -(-total_bytes // (EXPERTS * (up + down))))
    generator = torch.Generator().manual_seed(0)
    try:
        writer = PackWriter(path, {"model": "synthetic"}, layers * EXPERTS * (up + down))
        # The same random bytes for each layer: they are different blocks on disk, which is what matters.
        sizes = {"w13": up, "w2": down}
        tensors = {
            name: torch.randint(-(2**62), 2**62, (EXPERTS, size // 8), generator=generator)
            for name, size in sizes.items()
        }
        for layer in tqdm(range(layers), desc=f"Packing records of {(up + down) / MiB:g} MiB", unit="layer"):
            writer.put_layer(layer, tensors)
        writer.seal().close()
    except StoreError as error:
        raise AdapMoEError(str(error)) from None


class _Readers:
    """Read methods to compare, on one pack."""

    def __init__(self, path: Path) -> None:
        self.path = path
        store = open_pack(path, {})
        assert isinstance(store, FileStore)
        self.layout = store.layouts[0]
        if any(layout != self.layout for layout in store.layouts):
            raise AdapMoEError(f"{path} has records of several sizes; measure each with --record-mib")
        self.events = [range(store.num_experts(layer)) for layer in range(store.num_layers)]
        self.keys = [(layer, expert) for layer, experts in enumerate(self.events) for expert in experts]
        self.bytes = len(self.keys) * self.layout.nbytes
        self.offsets = sorted(map(store.record_offset, self.keys))
        largest_event = max(map(len, self.events))
        shape = CacheShape(
            [len(experts) for experts in self.events],
            AHEAD,
            [0] * len(self.events),
            [self.layout.nbytes] * len(self.events),
        )
        # Slots beyond a whole layer are for staging.
        self.setup = CacheSetup([max(SLOTS, largest_event + AHEAD)], "lru", lookahead=1, max_experts=AHEAD)
        if self.setup.slots[0] >= len(self.keys):
            raise AdapMoEError(f"{path} has {len(self.keys)} records, too few to measure; take a bigger model")
        self.shape = shape
        self.cache = ExpertCacheManager(store, CacheController(shape, self.setup), torch.device("cpu"))
        # Read into the slots' own memory: in a virtual machine one buffer was twice as fast as another.
        pool = self.cache.pools[0]
        self.buffers = [[as_bytes(tensor[slot]) for tensor in pool.tensors.values()] for slot in range(pool.num_slots)]

    def restart(self, checked: bool = True) -> None:
        """Empties the slots; with `checked` False, also makes the store verify every record's checksum again."""
        if not checked:
            self.cache.store.close()
            self.cache.store = open_pack(self.path, {})
        self.cache.restart(CacheController(self.shape, self.setup), None)

    def plain(self, threads: int) -> None:
        """Reads each record with one direct read into the next slot's memory, in the order of the file."""
        fd, _ = open_direct(self.path, os.O_RDONLY)
        numbers = iter(range(len(self.keys)))
        lock = threading.Lock()

        def read() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                count = read_full(fd, self.buffers[number % len(self.buffers)], self.offsets[number])
                assert count == self.layout.nbytes

        try:
            if threads == 1:
                read()
                return
            workers = [threading.Thread(target=read) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            os.close(fd)

    def demand(self, together: int) -> None:
        """Loads every expert on demand, `together` per event."""
        for layer, experts in enumerate(self.events):
            for start in range(0, len(experts), together):
                group = experts[start : start + together]
                self.cache.acquire(layer, group)
                self.cache.release(layer, group)

    def prefetch(self, together: int) -> None:
        """Prefetches every expert but the first layer's, waits until it is staged, and then requests it."""
        transfers = self.cache.transfers
        for layer, experts in enumerate(self.events[1:], start=1):
            for start in range(0, len(experts), together):
                group = list(experts[start : start + together])
                padding = [group[0]] * (AHEAD - len(group))  # a token has top_k experts, the last ones dropped
                predicted = PredictedExperts(np.array([group + padding]), np.arange(AHEAD)[None] < len(group))
                self.cache.prefetch(layer - 1, None, {1: predicted}.get)
                with transfers.changed:
                    while transfers.jobs or transfers.speculative:
                        transfers.changed.wait()
                self.cache.acquire(layer, group)
                self.cache.release(layer, group)


def _measure(path: Path, rounds: int) -> dict[str, Any]:
    readers = _Readers(path)
    methods: dict[str, Callable[[], None]] = {}
    for threads in PLAIN_THREADS:
        methods[f"plain, {threads} reader" + "s" * (threads > 1)] = partial(readers.plain, threads)
    for together in TOGETHER:
        methods[f"demand, {together} at a time"] = partial(readers.demand, together)
    for together in range(1, AHEAD + 1):
        methods[f"prefetch, {together} at a time"] = partial(readers.prefetch, together)
    methods["first reads, 4 at a time"] = partial(readers.demand, 4)
    readers.demand(TOGETHER[-1])  # commits the slots' memory, and verifies every record
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for number in tqdm(range(rounds), desc=f"Reading records of {readers.layout.nbytes / MiB:g} MiB", unit="round"):
        for name in rotated(list(methods), number):
            readers.restart(checked=not name.startswith("first"))
            measured[name].append(_timed(readers, name, methods[name]))
    readers.cache.close()
    points = []
    for name, runs in measured.items():
        ratios = [run["gbps"] / base["gbps"] for run, base in zip(runs, measured[BASE], strict=True)]
        point: dict[str, Any] = {
            "method": name,
            "bytes": runs[0]["bytes"],
            "gbps": spread([run["gbps"] for run in runs]),
        }
        if not name.startswith("plain"):
            point["busy_gbps"] = spread([run["bytes"] / run["busy"] / 1e9 for run in runs])
        points.append(point | {"of_plain": spread(ratios)})
    plain = [point for point in points if point["method"].startswith("plain")]
    best = max(plain, key=lambda point: point["gbps"]["median"])
    return {
        "record_bytes": readers.layout.nbytes,
        "records": len(readers.keys),
        "best_plain": best["method"],
        "points": points,
    }


def _timed(readers: _Readers, name: str, read: Callable[[], None]) -> dict[str, float]:
    start = time.perf_counter()
    read()
    seconds = time.perf_counter() - start
    stats = readers.cache.stats
    moved = readers.bytes if name.startswith("plain") else stats.fetched_bytes
    return {"gbps": moved / seconds / 1e9, "bytes": moved, "busy": stats.fetch_seconds}


def print_transfer(result: dict[str, Any], console: Console) -> None:
    """Prints one table per record size."""
    for pack in result["packs"]:
        title = f"{pack['records']} records of {pack['record_bytes'] / MiB:.4g} MiB, {result['rounds']} rounds"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("", "GB/s", "min .. max", "while busy", "of plain, 1 reader", "min .. max"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for point in pack["points"]:
            speed, ratio, busy = point["gbps"], point["of_plain"], point.get("busy_gbps")
            table.add_row(
                point["method"],
                f"{speed['median']:.2f}",
                f"{speed['min']:.2f} .. {speed['max']:.2f}",
                "" if busy is None else f"{busy['median']:.2f}",
                f"{ratio['median']:.2f}",
                f"{ratio['min']:.2f} .. {ratio['max']:.2f}",
            )
        console.print(table)
        console.print(f"best of the plain reads: {pack['best_plain']}")
    console.print("of plain: round by round; while busy: bytes over the time with a transfer in flight")
