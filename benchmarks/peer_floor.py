"""Computes the minimum decode time under a memory limit: bytes that have to move, and computing."""

import os
import time
from pathlib import Path

import numpy as np

from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import belady
from vllm_adapmoe.simulate.trace import Step, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.store.direct_io import open_direct, read_full
from vllm_adapmoe.store.file import open_pack
from vllm_adapmoe.store.record import aligned_empty

READ_BYTES = 1 << 30
"""Bytes of the pack to read when measuring the disk."""


def pack_shape(pack: Path) -> tuple[int, int]:
    """Returns the number of experts in a pack, and the bytes of the largest."""
    store = open_pack(pack, {})
    try:
        experts = sum(store.num_experts(layer) for layer in range(store.num_layers))
        return experts, max(layout.nbytes for layout in store.layouts)
    finally:
        store.close()


def sequential_bandwidth(pack: Path, record_bytes: int) -> float:
    """Measures bytes per second of reading a pack from its start with direct I/O, one record at a time."""
    buffer = aligned_empty(record_bytes)
    fd, _ = open_direct(pack, os.O_RDONLY)
    try:
        start, done = time.perf_counter(), 0
        while done < READ_BYTES and (count := read_full(fd, [buffer], done)) == record_bytes:
            done += count
        return done / (time.perf_counter() - start)
    finally:
        os.close(fd)


def belady_decode_bytes(trace: Path, slots: int) -> list[float]:
    """Returns for each sequence of a trace the bytes per decoded token that an optimal cache would have moved.

    Each sequence starts with an empty cache, and its prompt is one step. Any cache has to fetch the experts of that
    step once; the remaining bytes are those that decoding has to move.
    """
    info, recorded = read_trace(trace)
    steps = list(recorded)
    starts = [number for number, step in enumerate(steps) if step.positions[0] == 0]
    sequences = [steps[start:end] for start, end in zip(starts, [*starts[1:], len(steps)], strict=True)]
    return [
        (_belady_bytes(info, sequence, slots) - _belady_bytes(info, sequence[:1], slots)) / (len(sequence) - 1)
        for sequence in sequences
    ]


def _belady_bytes(info: TraceInfo, steps: list[Step], slots: int) -> float:
    return float(belady(info, steps, slots_of_pools(info, slots)) @ np.array(info.expert_bytes))
