"""DemandCopies: copies of missing experts to a device, for which the device waits and not the host."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.policy.cache_stats import CacheStats


class Timed(NamedTuple):
    """Events of a request whose times are not counted yet."""

    begun: torch.cuda.Event
    """Before its copies."""
    ended: torch.cuda.Event
    """After them."""
    reached: torch.cuda.Event
    """Where the kernels' stream waits for them."""
    stalls: bool
    """Whether that wait counts as a stall."""
    release: Callable[[], None]
    """Called once the copies have ended."""


class DemandCopies:
    """Copies page-locked records to slots on a stream of its own, in the order of the requests.

    The requesting thread only launches them: work that it launches afterwards **on the stream that is current now**
    runs once the records are in their slots. A reader thread and a wait on the host for each record would take longer
    than the copy of a small one: requests of 9 MiB records got 0.41 to 0.55 of a plain copy's bandwidth on an H200, and
    get 0.93 to 0.97 (examples/benchmarks/gpu/).

    Call its methods in the requesting thread, with the lock of the transfers held while other threads run.

    Args:
        device: CUDA device of the slots.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.ended: torch.cuda.Event | None = None
        """Event at the end of all copies so far; None before the first. Prefetches wait for it."""
        self._timed: deque[Timed] = deque()

    def issue(
        self,
        pool: SlotPool,
        copies: Sequence[tuple[int, torch.Tensor]],
        stalls: bool,
        release: Callable[[], None],
    ) -> None:
        """Launches copies, and lets the current stream wait for them.

        Args:
            pool: pool of the slots.
            copies: slots, and the records to copy there, uint8 `[record bytes]`. No kernel launched from now on uses
                the experts that the slots held before.
            stalls: whether the wait counts as a stall: not if the host waits for other loads of the request.
            release: called by `count` or `finish` when the copies have ended: nothing reads the records any more.
        """
        stream, waiting = self._stream, torch.cuda.current_stream(self._device)
        begun, ended, reached = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        reached.record(waiting)  # before the copies are launched: an idle stream waits from now on
        pool.hold_until_unused(stream)
        with torch.cuda.stream(stream):
            begun.record()
            for slot, record in copies:
                pool.copy_whole(slot, record)
            ended.record()
        waiting.wait_event(ended)
        self.ended = ended  # only now: other threads wait for it, and it must have been recorded
        self._timed.append(Timed(begun, ended, reached, stalls, release))

    def count(self, stats: CacheStats) -> None:
        """Adds the times of requests that have ended to `fetch_seconds` and `stall_seconds`; not while capturing."""
        while self._timed and all(event.query() for event in self._timed[0][:3]):
            timed = self._timed.popleft()
            timed.release()
            stats.fetch_seconds += timed.begun.elapsed_time(timed.ended) / 1e3
            if timed.stalls:
                stats.stall_seconds += max(0.0, timed.reached.elapsed_time(timed.ended)) / 1e3

    def finish(self, stats: CacheStats) -> None:
        """Waits on the host until all copies have ended, and counts them."""
        self._stream.synchronize()
        for timed in self._timed:
            timed.reached.synchronize()
        self.count(stats)
