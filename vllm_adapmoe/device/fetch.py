"""Copies experts' records from page-locked host memory into slots, on the GPU and as the GPU has decided (`claim`).

A record is bytes: whatever the quantisation, its pieces lie one after the other in host memory, and each goes to a
tensor of slots of its own. How many copies there are is known when the kernel runs, so a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.device.residency import Loads

PROGRAMS = 64
"""Programs that share the copies: with 256 threads of four loads of 16 bytes, 1 MiB is in flight, ten times what a link
of 55 GB/s holds in two microseconds; and half of a large GPU's processors remain for a kernel that runs beside."""
CHUNK = 16384
"""Bytes that a program copies at a time."""
WARPS = 8


# Not specialised on the number of pieces' bytes: those are in memory, and differ between models alone.
@triton.jit
def _fetch(entries, count, pieces, PIECES: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    copies = tl.load(count)
    for piece in range(PIECES):
        offset = tl.load(pieces + 3 * piece)
        size = tl.load(pieces + 3 * piece + 1)
        slots = tl.load(pieces + 3 * piece + 2)
        chunks = (size + CHUNK - 1) // CHUNK
        for number in range(program, copies * chunks, PROGRAMS):
            entry = entries + 2 * (number // chunks)
            start = (number % chunks) * CHUNK
            source = tl.load(entry) + offset + start
            slot = tl.load(entry + 1)
            target = slots + slot * size + start
            length = tl.where(slot < 0, 0, size)  # of an expert without a slot nothing: the host ends the engine
            if size % 16 == 0:
                # A pointer that comes out of memory has no known alignment, and would be read two bytes at a time. The
                # hint has to be on the pointer: on the integer it is lost.
                wide_source = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
                wide_target = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
                line = tl.arange(0, CHUNK // 16)[:, None]
                word = line * 4 + tl.arange(0, 4)[None, :]
                mask = (start + 16 * line < length) & (tl.arange(0, 4)[None, :] >= 0)
                tl.store(wide_target + word, tl.load(wide_source + word, mask=mask), mask=mask)
            else:
                byte = tl.arange(0, CHUNK)
                in_piece = start + byte < length
                narrow = source.to(tl.pointer_type(tl.uint8))
                tl.store(
                    target.to(tl.pointer_type(tl.uint8)) + byte, tl.load(narrow + byte, mask=in_piece), mask=in_piece
                )


class Fetch:
    """Copies records into one pool of slots.

    Args:
        pool: the pool; its tensors must not move.
    """

    def __init__(self, pool: SlotPool) -> None:
        rows = [(piece.offset, piece.nbytes, pool.tensors[piece.name].data_ptr()) for piece in pool.layout.pieces]
        self.pieces = torch.tensor(rows, dtype=torch.int64).to(pool.device)
        """Offset in the record, bytes, and address of the first slot of each piece, int64 `[pieces, 3]`."""

    def __call__(self, loads: Loads, kind: int) -> None:
        """Launches the copies of a list of `loads`: 0 for demand loads, 1 for prefetches. One launch."""
        _fetch[(PROGRAMS,)](
            loads.entries[kind], loads.counts[kind:], self.pieces,
            PIECES=len(self.pieces), PROGRAMS=PROGRAMS, CHUNK=CHUNK, num_warps=WARPS,
        )  # fmt: skip
