"""TransferEngine: moves experts from the store into slots with reader threads, demand loads before prefetches."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from vllm_adapmoe.cache.demand_copies import DemandCopies
from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import Request, State
from vllm_adapmoe.policy.tiles import tile_bytes
from vllm_adapmoe.store.base import ExpertStore, StoreError

logger = logging.getLogger(__name__)

READERS = 4
"""Number of reader threads. A disk needs a few requests in flight: 4 plain readers get 1.05 to 1.11 times one's,
2 nearly the same (examples/benchmarks/transfer.json); more threads only compete for the cores."""
SPECULATORS = 2
"""Maximum readers busy with speculative loads: a demand load never waits for more tiles than that."""


class CacheClosed(StoreError):
    """The cache was closed before an expert was loaded."""

    def __init__(self) -> None:
        super().__init__("the expert cache is closed")


@dataclass
class Job:
    """One transfer of a record into a slot."""

    key: ExpertKey
    urgent: bool
    slot: int = -1
    ready: float = 0.0
    """Earliest time at which the next tile could start on the link, of `time.perf_counter`."""
    tiles: Iterator[int] | None = None
    moved: int = 0
    counted_speculative: bool = False
    """Started as a speculative job, and so counted in `TransferEngine.speculating`."""


class LinkLimit:
    """Simulates a link of `bytes_per_second`, which carries one tile after the other.

    A tile starts as soon as it is ready and the link is free, even if its thread wakes late, as with the queue of a
    copy engine.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int, ready: float) -> float:
        """Reserves the link for `nbytes` that were ready at `ready`; returns the time of their arrival."""
        with self._lock:
            self._free_at = max(ready, self._free_at) + nbytes / self.bytes_per_second
            return self._free_at


class TransferEngine:
    """Queues of loads and the reader threads that serve them.

    Call every method but `run` and `close` with `lock` held, which also guards the controller.

    Args:
        controller: called when a speculative load starts and when a transfer ends.
        pools: memory of the slots.
        store: backing store.
        readers: number of threads; 0: the waiting thread moves everything itself, in order of submission.
        link_bytes_per_second: simulated bandwidth limit of the link; None: no limit.
        cpus: CPUs that the threads run on; None: those of the creating thread.
        demand_copies: copies demand loads of page-locked records, without threads; None: the threads do.
    """

    def __init__(
        self,
        controller: CacheController,
        pools: list[SlotPool],
        store: ExpertStore,
        readers: int = READERS,
        link_bytes_per_second: float | None = None,
        cpus: Collection[int] | None = None,
        demand_copies: DemandCopies | None = None,
    ) -> None:
        self.controller = controller
        self.pools = pools
        self.store = store
        self.link = None if link_bytes_per_second is None else LinkLimit(link_bytes_per_second)
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.jobs: dict[ExpertKey, Job] = {}
        """Demand jobs, and speculative jobs that have started."""
        self.urgent: deque[Job] = deque()
        """Demand jobs that no thread runs yet."""
        self.speculative: deque[Job] = deque()
        """Speculative jobs that wait for a thread, some of them paused between two tiles."""
        self.demanding = 0
        """Number of urgent jobs that have not ended."""
        self.speculating = 0
        """Number of threads running speculative jobs."""
        self.errors: dict[ExpertKey, Exception] = {}
        """Errors of failed demand loads, until the waiting layer raises them."""
        self.closing = False
        self.fatal: Exception | None = None
        """Error that has ended all transfers: any but a read error."""
        self.frozen = 0
        """Number of open contexts that prevent evictions: no speculative load starts meanwhile."""
        self.quiet = False
        """Whether transfers are stopped: between `drain` and `resume`."""
        self.cpus = cpus
        self.demand_copies = demand_copies
        self._counted_until = 0.0
        """Time up to which `fetch_seconds` is counted, of `time.perf_counter`."""
        self.threads = [
            threading.Thread(target=self._serve, name=f"expert-reader-{number}", daemon=True)
            for number in range(readers)
        ]
        for thread in self.threads:
            thread.start()

    # Called by the manager

    def submit(self, request: Request) -> None:
        """Starts an event's demand loads, and gives the loads in flight that it awaits demand priority.

        Loads that `demand_copies` takes have ended for the host: what it launches from now on finds them in slots.
        """
        for load in request.awaited:
            self._promote(load.key)
        copies, copied = [], []
        for load in request.loads:
            record = None if self.demand_copies is None else self.store.hold(load.key)
            if record is None:
                self._queue_urgent(Job(load.key, urgent=True, slot=load.slot))
            else:
                copies.append((load.slot, record))
                copied.append(load.key)
        if self.demand_copies is None or not copies:
            return
        pool = self.pools[self.controller.pool_of[copied[0][0]]]  # a request is of one layer
        host_waits = bool(request.awaited) or len(copies) < len(request.loads)
        try:
            self.demand_copies.count(self.controller.stats)
            self.demand_copies.issue(pool, copies, not host_waits, partial(self._release, copied))
        except Exception as error:
            self._fail(error)
            raise
        for key in copied:
            self.controller.transfer_ended(key, pool.record_bytes, complete=True)

    def _release(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            self.store.release(key)

    def _promote(self, key: ExpertKey) -> None:
        job = self.jobs[key]
        job.urgent = True
        if job in self.speculative:  # between two tiles: no thread runs it
            self.speculative.remove(job)
            self._queue_urgent(job)
        else:
            self.demanding += 1

    def speculate(self, keys: Sequence[ExpertKey]) -> None:
        """Queues experts to load while no demand load is pending."""
        for key in keys:
            self.speculative.append(Job(key, urgent=False))
            self.changed.notify()

    def _queue_urgent(self, job: Job) -> None:
        self._count_time()
        job.ready = time.perf_counter()
        self.jobs[job.key] = job
        self.urgent.append(job)
        self.demanding += 1
        self.changed.notify()

    # Called by the threads

    def next_urgent(self) -> Job | None:
        """Returns the next demand job, if any."""
        return self.urgent.popleft() if self.urgent and not self._ended else None

    def next_speculative(self, during_demand: bool = False) -> Job | None:
        """Returns a speculative job to start or resume, if any; while demand jobs run, only with `during_demand`."""
        while (
            self.speculative
            and not self._ended
            and (during_demand or not self.demanding)
            and self.speculating < SPECULATORS
        ):
            if (self.frozen or self.quiet) and self.speculative[0].tiles is None:
                return None
            job = self.speculative.popleft()
            if job.tiles is None:
                load = self.controller.start_speculation(job.key)
                if load is None:
                    continue
                job.slot = load.slot
                self._count_time()
                self.jobs[job.key] = job
            job.counted_speculative = True
            self.speculating += 1
            job.ready = time.perf_counter()
            return job
        return None

    @property
    def _ended(self) -> bool:
        return self.closing or self.fatal is not None

    def _serve(self) -> None:
        try:
            self._serve_jobs()
        except Exception as error:  # or the waiting thread would wait forever
            with self.changed:
                self._fail(error)

    def _serve_jobs(self) -> None:
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        while True:
            with self.changed:
                while (job := self.next_urgent() or self.next_speculative()) is None and not self.closing:
                    self.changed.wait()
            if job is None:
                return
            self.run(job)

    def run(self, job: Job) -> None:
        """Moves a job's tiles until it ends, is cancelled, or yields to a demand load. Call without `lock`."""
        complete, error = False, None
        try:
            if job.tiles is None:
                job.tiles = self._tiles(job)
            complete = self._move(job, job.tiles)
        except Exception as caught:  # raised again in the requesting thread
            error = caught
        with self.changed:
            if job.counted_speculative:  # it may have become urgent since
                self.speculating -= 1
                job.counted_speculative = False
            if complete or error is not None or self._is_cancelled(job):
                self._end(job, complete, error)
            elif job.urgent:  # promoted between its last tile and here
                self.urgent.append(job)
            else:
                self.speculative.appendleft(job)
            self.changed.notify_all()

    def _tiles(self, job: Job) -> Iterator[int]:
        pool = self.pools[self.controller.pool_of[job.key[0]]]
        limit = None if self.link is None else self.link.bytes_per_second
        tile = tile_bytes(pool.layout.nbytes, job.urgent, limit)
        record = self.store.hold(job.key) if pool.device.type == "cuda" else None
        if record is None:
            yield from pool.fill(job.slot, lambda buffers: self.store.read_tiles(job.key, buffers, tile))
            return
        try:
            yield from pool.copy(job.slot, record, tile, self._demand_ended)
        finally:
            self.store.release(job.key)

    def _demand_ended(self) -> torch.cuda.Event | None:
        return None if self.demand_copies is None else self.demand_copies.ended

    def _move(self, job: Job, tiles: Iterator[int]) -> bool:
        """Returns whether the record is complete; False: it was cancelled, or a demand load goes first."""
        for nbytes in tiles:
            job.moved += nbytes
            if self.link is not None:
                job.ready = self.link.reserve(nbytes, job.ready)
                wait_seconds = job.ready - time.perf_counter()
                if wait_seconds > 0:
                    time.sleep(wait_seconds)
            if self.closing or (not job.urgent and self.threads and (self.demanding or self._is_cancelled(job))):
                return False
        return True

    def _is_cancelled(self, job: Job) -> bool:
        return self.closing or self.controller.residency(job.key[0]).is_cancelled(job.key)

    def _count_time(self) -> None:
        """Adds the time up to now to `fetch_seconds` if any job is in flight; called before `jobs` changes."""
        now = time.perf_counter()
        if self.jobs:
            self.controller.stats.fetch_seconds += now - self._counted_until
        self._counted_until = now

    def _end(self, job: Job, complete: bool, error: Exception | None) -> None:
        self._count_time()
        del self.jobs[job.key]
        if job.tiles is not None and not complete:
            try:
                job.tiles.close()  # type: ignore[attr-defined]
            except Exception as caught:  # of a copy in flight
                error = error or caught
        if job.urgent:
            self.demanding -= 1
        state = self.controller.transfer_ended(job.key, job.moved, complete)
        if error is not None and not isinstance(error, (StoreError, OSError)) and not self.closing:
            self._fail(error)
        elif job.urgent and not complete:
            self.errors[job.key] = error or CacheClosed()
        elif error is not None:
            logger.warning("Expert cache: a prefetch failed and is dropped: %s", error)
        assert state is not State.ABSENT or not complete or not job.urgent

    def _fail(self, error: Exception) -> None:
        """Ends all transfers: after a CUDA error every later call would fail too."""
        self.fatal = self.fatal or error
        self.changed.notify_all()

    def check(self) -> None:
        """Raises the error that has ended the transfers, if any."""
        if self.fatal is not None:
            raise self.fatal

    # For the capture of graphs

    def drain(self) -> None:
        """Waits until transfers in flight have ended and starts none until `resume`, so that no thread calls CUDA."""
        self.quiet = True
        while self.jobs:
            self.check()
            self.changed.wait()
        self.check()

    def resume(self) -> None:
        """Resumes transfers after `drain`."""
        self.quiet = False
        self.changed.notify_all()

    def close(self) -> None:
        """Ends the threads after their current tile; drops loads in flight, with `CacheClosed` for waiting layers.

        Call without `lock`.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        with self.changed:
            paused = [job for job in self.speculative if job.tiles is not None]
            for job in [*self.urgent, *paused]:  # those that no thread runs
                self._end(job, False, None)
            self.urgent.clear()
            self.speculative.clear()
            self.changed.notify_all()
