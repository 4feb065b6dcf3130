"""DemandCopies: copies of missing experts to a device, for which the device waits and not the host."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.policy.cache_stats import CacheStats


@dataclass(frozen=True)
class Copy:
    """A page-locked record to copy."""

    pool: SlotPool
    slot: int
    record: torch.Tensor
    """uint8 `[record bytes]`."""


class DemandCopies:
    """Copies page-locked records to slots on a stream of its own, in the order of the requests.

    The requesting thread only launches them: work that it launches afterwards on its current stream runs once the
    records are in their slots. A reader thread and a wait on the host for each record would take longer than the copy
    of a small one: requests of 9 MiB records got 0.41 to 0.55 of a plain copy's bandwidth on an H200.

    Call every method but `ended` with the lock of the transfers held.

    Args:
        device: CUDA device of the slots.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.ended: torch.cuda.Event | None = None
        """Event at the end of all copies so far; None before the first. Prefetches wait for it."""
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = deque()
        """Of each request not counted yet: begin and end of its copies, and the device's arrival where it waits."""

    def issue(self, copies: Sequence[Copy], stats: CacheStats) -> None:
        """Launches copies, and lets the current stream wait for them.

        Args:
            copies: records to copy; no kernel launched from now on uses the experts that the slots held before.
            stats: counters, to which the times of requests that have ended since are added.
        """
        stream = self._stream
        for pool in {id(copy.pool): copy.pool for copy in copies}.values():
            pool.hold_until_unused(stream)
        begun, ended, reached = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        with torch.cuda.stream(stream):
            begun.record()
            for copy in copies:
                copy.pool.copy_whole(copy.slot, copy.record)
            ended.record()
        waiting = torch.cuda.current_stream(self._device)
        reached.record(waiting)
        waiting.wait_event(ended)
        self.ended = ended  # only now: other threads wait for it, and it must have been recorded
        self.count(stats)
        self._timed.append((begun, ended, reached))

    def count(self, stats: CacheStats) -> None:
        """Adds the times of requests that have ended to `fetch_seconds`, and the device's waits to `stall_seconds`."""
        while self._timed and all(event.query() for event in self._timed[0]):
            begun, ended, reached = self._timed.popleft()
            stats.fetch_seconds += begun.elapsed_time(ended) / 1e3
            stats.stall_seconds += max(0.0, reached.elapsed_time(ended)) / 1e3

    def finish(self, stats: CacheStats) -> None:
        """Waits on the host until all copies have ended."""
        self._stream.synchronize()
        self.count(stats)
