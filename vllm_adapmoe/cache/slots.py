"""SlotPool: the memory of a pool of slots, one tensor `[slots, ...]` for each piece of an expert."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_adapmoe.store.record import RecordLayout, aligned_empty

IN_FLIGHT = 2
"""Copies issued to the device at a time: with one, the link would idle until the host notices the copy's end."""


class SlotPool:
    """Memory of `num_slots` slots for experts of one layout.

    Kernels index `tensors[name]`, shape `[num_slots, *piece.shape]`, by slot, as if the slots were a layer's experts.
    On the CPU memory is committed when a slot is first filled.
    """

    def __init__(self, layout: RecordLayout, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.device = device
        self.record_bytes = sum(piece.nbytes for piece in layout.pieces)
        """Bytes that are moved to fill a slot."""
        self.tensors: dict[str, torch.Tensor] = {}
        bytes_of_slot: list[list[torch.Tensor]] = [[] for _ in range(num_slots)]
        for piece in layout.pieces:
            size = piece.nbytes
            if device.type == "cpu":
                memory = aligned_empty(num_slots * size)
            else:
                memory = torch.zeros(num_slots * size, dtype=torch.uint8, device=device)  # warm-up reads them
            self.tensors[piece.name] = memory.view(piece.dtype).view(num_slots, *piece.shape)
            for slot in range(num_slots):
                bytes_of_slot[slot].append(memory[slot * size : (slot + 1) * size])
        self._bytes_of_slot = bytes_of_slot
        self._staging: list[torch.Tensor] = []
        """Page-locked record buffers not in use by a transfer."""
        self._streams: list[torch.cuda.Stream] = []
        """CUDA streams not in use by a copy. Shared by the threads: PyTorch has 32 per device, then reuses them."""
        self._used: torch.cuda.Event | None = None
        self.mark_used()  # by the kernel that writes the zeros: copies must wait for it

    @property
    def nbytes(self) -> int:
        """Total bytes of all slots."""
        return self.num_slots * self.layout.nbytes

    def fill(self, slot: int, read: Callable[[Sequence[torch.Tensor]], Iterator[int]]) -> Iterator[int]:
        """Reads a record into a slot, tile by tile; yields the bytes of each tile.

        `read` fills host memory: uint8, flat, one tensor per piece in layout order. On the CPU that is the slot itself;
        for a device it is a page-locked buffer that is then copied. The slot is filled when the iterator has ended.
        """
        if self.device.type == "cpu":
            yield from read(self._bytes_of_slot[slot])
            return
        try:
            staging = self._staging.pop()
        except IndexError:  # a check before would race: another thread may take the last one in between
            staging = aligned_empty(self.layout.nbytes, pin=True)
        try:
            yield from read([staging[p.offset : p.offset + p.nbytes] for p in self.layout.pieces])
            for _ in self.copy(slot, staging, self.layout.nbytes):
                pass
        finally:
            self._staging.append(staging)

    def copy_whole(self, slot: int, record: torch.Tensor) -> None:
        """Launches the copy of a page-locked record, uint8 `[record bytes]`, to a slot, on the current stream.

        That stream must hold the copy until no kernel reads the slot's previous expert: `hold_until_unused`.
        """
        for piece, memory in zip(self.layout.pieces, self._bytes_of_slot[slot], strict=True):
            memory.copy_(record[piece.offset : piece.offset + piece.nbytes], non_blocking=True)

    def hold_until_unused(self, stream: torch.cuda.Stream) -> None:
        """Lets a stream wait for all kernels that may read slots of evicted experts (`mark_used`)."""
        if self._used is not None:
            stream.wait_event(self._used)

    def copy(
        self,
        slot: int,
        record: torch.Tensor,
        tile_bytes: int,
        first: Callable[[], torch.cuda.Event | None] = lambda: None,
    ) -> Iterator[int]:
        """Copies a page-locked record, uint8 `[record bytes]`, to a slot on a device; yields the bytes of each tile.

        Runs on its own stream, after all kernels that may read the slot's previous expert. The slot is filled when the
        iterator has ended; however it ends, no copy to the slot is in flight any more.

        Args:
            slot: slot to fill.
            record: the record.
            tile_bytes: maximum bytes of a tile.
            first: returns the event that each tile waits for on the device.
        """
        try:
            stream = self._streams.pop()
        except IndexError:
            stream = torch.cuda.Stream(self.device)
        self.hold_until_unused(stream)
        in_flight: deque[tuple[torch.cuda.Event, int]] = deque()
        try:
            for number, start, stop in self.layout.tiles(tile_bytes):
                offset = self.layout.pieces[number].offset
                if (others := first()) is not None:
                    stream.wait_event(others)
                with torch.cuda.stream(stream):
                    source = record[offset + start : offset + stop]
                    self._bytes_of_slot[slot][number][start:stop].copy_(source, non_blocking=True)
                event = torch.cuda.Event()
                event.record(stream)
                in_flight.append((event, stop - start))
                if len(in_flight) == IN_FLIGHT:
                    yield _wait(*in_flight.popleft())
            while in_flight:
                yield _wait(*in_flight.popleft())
        except BaseException:  # closed before its end, or an error; the copy that failed may have no event
            stream.synchronize()
            raise
        finally:
            self._streams.append(stream)

    def mark_used(self) -> None:
        """Records that every kernel that reads slots has been launched; copies into slots wait until they have run."""
        if self.device.type == "cuda":
            used = torch.cuda.Event()
            used.record()
            self._used = used  # only now: other threads read it, and waiting for an unrecorded event returns at once


def _wait(event: torch.cuda.Event, nbytes: int) -> int:
    event.synchronize()
    return nbytes
