"""Moves experts from the store into slots: reader threads, demand before speculation, tile by tile."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from vllm_adapmoe.cache.slots import SlotPool
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.residency import Load, State
from vllm_adapmoe.policy.tiles import tile_bytes
from vllm_adapmoe.store.base import ExpertStore, StoreError

logger = logging.getLogger(__name__)

READERS = 4
"""Threads that read records. A disk wants a few requests in flight; more only contend for the cores."""
SPECULATORS = 2
"""Of those, the most that speculation occupies: demand never waits for more tiles than that."""


class CacheClosed(StoreError):
    """The cache ended before an expert was there."""

    def __init__(self) -> None:
        super().__init__("the expert cache is closed")


@dataclass
class Job:
    """One record on its way."""

    key: ExpertKey
    urgent: bool
    slot: int = -1
    ready: float = 0.0
    """Since when the link could have carried its next tile, of `time.perf_counter`."""
    tiles: Iterator[int] | None = None
    moved: int = 0
    beside: bool = False
    """Taken while nobody waited for it: of those that `TransferEngine.speculating` counts."""


class LinkLimit:
    """Lets bytes pass no faster than a link of `bytes_per_second` would, one tile after the other.

    The link works on while a thread that waited for it is late to wake: what was ready goes on the link as soon as
    it is free, as a copy engine with a queue would do it.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int, ready: float) -> float:
        """Takes the link for `nbytes` that were there at `ready`; returns when they will have passed."""
        with self._lock:
            self._free_at = max(ready, self._free_at) + nbytes / self.bytes_per_second
            return self._free_at


class TransferEngine:
    """The queues of a worker and the threads that serve them.

    Every method but `run` is called with `lock` held, which also guards the controller.

    Args:
        controller: told when speculation starts and when a transfer ends.
        pools: the slots' memory.
        store: backing copies.
        readers: threads; 0: the thread that waits moves everything itself, in the order of submission.
        link_bytes_per_second: limit of the link; None: as fast as it goes.
        cpus: where the threads run; None: where the thread that makes them does.
        left: told, with `lock` held, which expert speculation has taken the slot of.
        arrived: told, with `lock` held, which expert is resident, and in which slot, without anybody having waited.
    """

    def __init__(
        self,
        controller: CacheController,
        pools: list[SlotPool],
        store: ExpertStore,
        readers: int = READERS,
        link_bytes_per_second: float | None = None,
        cpus: Collection[int] | None = None,
        left: Callable[[ExpertKey], None] | None = None,
        arrived: Callable[[ExpertKey, int], None] | None = None,
    ) -> None:
        self.controller = controller
        self.left, self.arrived = left, arrived
        self.pools = pools
        self.store = store
        self.link = None if link_bytes_per_second is None else LinkLimit(link_bytes_per_second)
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.jobs: dict[ExpertKey, Job] = {}
        """Demand, and speculation that has started."""
        self.urgent: deque[Job] = deque()
        self.idle: deque[Job] = deque()
        self.demanding = 0
        """Urgent jobs that have not ended."""
        self.speculating = 0
        """Threads at work on speculation."""
        self.errors: dict[ExpertKey, Exception] = {}
        """Of demand loads that failed, until the waiting layer takes them."""
        self.closing = False
        self.fatal: Exception | None = None
        """Ended the transfers for good: an error that is not one of reading."""
        self.frozen = 0
        """Contexts within which no expert may be evicted: nothing speculative starts."""
        self.quiet = False
        """Between `drain` and `resume`."""
        self.cpus = cpus
        self._counted_until = 0.0
        """Up to when `fetch_seconds` is counted, of `time.perf_counter`."""
        self.threads = [
            threading.Thread(target=self._serve, name=f"expert-reader-{number}", daemon=True)
            for number in range(readers)
        ]
        for thread in self.threads:
            thread.start()

    # What the controller asks for

    def demand(self, load: Load) -> None:
        self._queue_urgent(Job(load.key, urgent=True, slot=load.slot))

    def promote(self, key: ExpertKey) -> None:
        job = self.jobs[key]
        job.urgent = True
        if job in self.idle:  # between two tiles: nobody is at work on it
            self.idle.remove(job)
            self._queue_urgent(job)
        else:
            self.demanding += 1

    def speculate(self, key: ExpertKey) -> None:
        self.idle.append(Job(key, urgent=False))
        self.changed.notify()

    def _queue_urgent(self, job: Job) -> None:
        self._count_time()
        job.ready = time.perf_counter()
        self.jobs[job.key] = job
        self.urgent.append(job)
        self.demanding += 1
        self.changed.notify()

    # What the threads do

    def next_urgent(self) -> Job | None:
        """A job for a thread that waits for demand anyway."""
        return self.urgent.popleft() if self.urgent and not self._ended else None

    def next_idle(self, beside_demand: bool = False) -> Job | None:
        """A speculative job that may start or go on now; not beside demand, unless that is asked for."""
        while (
            self.idle and not self._ended and (beside_demand or not self.demanding) and self.speculating < SPECULATORS
        ):
            if (self.frozen or self.quiet) and self.idle[0].tiles is None:
                return None
            job = self.idle.popleft()
            if job.tiles is None:
                load = self.controller.start_speculation(job.key)
                if load is None:
                    continue
                job.slot = load.slot
                if load.evicted is not None and self.left is not None:
                    self.left(load.evicted)
                self._count_time()
                self.jobs[job.key] = job
            job.beside = True
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
        except Exception as error:  # or the thread that waits would wait for ever
            with self.changed:
                self._fail(error)

    def _serve_jobs(self) -> None:
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        while True:
            with self.changed:
                while (job := self.next_urgent() or self.next_idle()) is None and not self.closing:
                    self.changed.wait()
            if job is None:
                return
            self.run(job)

    def run(self, job: Job) -> None:
        """Moves a job's tiles to its end, or until it is unwanted or overtaken. Without `lock`."""
        complete, error = False, None
        try:
            if job.tiles is None:
                job.tiles = self._tiles(job)
            complete = self._move(job, job.tiles)
        except Exception as caught:  # raised again in the thread that asks
            error = caught
        with self.changed:
            if job.beside:  # it may have become urgent since
                self.speculating -= 1
                job.beside = False
            if complete or error is not None or self._unwanted(job):
                self._end(job, complete, error)
            elif job.urgent:  # promoted between its last tile and here
                self.urgent.append(job)
            else:
                self.idle.appendleft(job)
            self.changed.notify_all()

    def _tiles(self, job: Job) -> Iterator[int]:
        pool = self.pools[self.controller.pool_of[job.key[0]]]
        limit = None if self.link is None else self.link.bytes_per_second
        tile = tile_bytes(pool.layout.nbytes, job.urgent, limit)
        record = self.store.page_locked(job.key) if pool.device.type == "cuda" else None
        if record is not None:
            return pool.copy(job.slot, record, tile)
        return pool.fill(job.slot, lambda buffers: self.store.read_tiles(job.key, buffers, tile))

    def _move(self, job: Job, tiles: Iterator[int]) -> bool:
        """Returns whether the record is whole; False: it is unwanted, or something else is more urgent."""
        for nbytes in tiles:
            job.moved += nbytes
            if self.link is not None:
                job.ready = self.link.reserve(nbytes, job.ready)
                rest = job.ready - time.perf_counter()
                if rest > 0:
                    time.sleep(rest)
            if self.closing or (not job.urgent and self.threads and (self.demanding or self._unwanted(job))):
                return False
        return True

    def _unwanted(self, job: Job) -> bool:
        entry = self.controller.residency(job.key[0]).entries.get(job.key)
        return self.closing or entry is None or entry.cancelled

    def _count_time(self) -> None:
        """Counts the time up to now, before `jobs` changes: it was busy if there were any."""
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
            except Exception as caught:  # of a copy that was under way
                error = error or caught
        if job.urgent:
            self.demanding -= 1
        state = self.controller.transfer_ended(job.key, job.moved, complete)
        if state is State.RESIDENT and not job.urgent and self.arrived is not None:
            self.arrived(job.key, job.slot)
        if error is not None and not isinstance(error, (StoreError, OSError)) and not self.closing:
            self._fail(error)
        elif job.urgent and not complete:
            self.errors[job.key] = error or CacheClosed()
        elif error is not None:
            logger.warning("Expert cache: a prefetch failed and is dropped: %s", error)
        assert state is not State.ABSENT or not complete or not job.urgent

    def _fail(self, error: Exception) -> None:
        """Ends the transfers: an error of CUDA stays, and every later call would meet it again."""
        self.fatal = self.fatal or error
        self.changed.notify_all()

    def check(self) -> None:
        """Raises what has ended the transfers, if anything has."""
        if self.fatal is not None:
            raise self.fatal

    # For the capture of graphs

    def drain(self) -> None:
        """Waits until transfers in flight have ended, and starts none until `resume`: no thread calls CUDA then."""
        self.quiet = True
        while self.jobs:
            self.check()
            self.changed.wait()
        self.check()

    def resume(self) -> None:
        """Starts transfers again."""
        self.quiet = False
        self.changed.notify_all()

    def close(self) -> None:
        """Ends the threads after their tile; whatever is under way comes to nothing, and who waits for it is told.

        Without `lock`.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        with self.changed:
            for job in [*self.urgent, *(job for job in self.idle if job.tiles is not None)]:  # that nobody took
                self._end(job, False, None)
            self.urgent.clear()
            self.idle.clear()
            self.changed.notify_all()
