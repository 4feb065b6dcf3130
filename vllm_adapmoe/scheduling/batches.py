"""Batches: the order in which waiting requests start, so that requests that run together use the same experts."""

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np

MAX_WINDOW = 256
"""Maximum number of waiting requests that are compared with a batch: bounds the time per step."""


@dataclass(frozen=True)
class QueuedRequest:
    """A waiting request."""

    name: str
    signature: np.ndarray
    """Float `[width]`: requests with a large dot product use similar experts."""


class Batches:
    """Chooses which waiting requests start next: the oldest, and then those most similar to it.

    As many requests as run at once are a batch: once that many have started, the next batch begins with the oldest
    request that waits. So, one by one, running requests are replaced by requests that are similar to one another, and a
    waiting request waits for at most one batch for each older one. No running request is delayed. (Ours.)

    Args:
        max_overtakes: maximum number of later requests that start before a waiting one, in batches; once it has been
            overtaken that often, it is the next to start. 0: requests start in order of arrival.
    """

    def __init__(self, max_overtakes: float) -> None:
        self.max_overtakes = max_overtakes
        self._total: np.ndarray | None = None
        """Sum of the batch's signatures; None: the next request begins a batch."""
        self._count = 0
        """Number of requests of the batch that have started."""
        self._overtaken: dict[str, int] = {}
        """Number of later requests that have started before each waiting request, if any."""

    def window(self, size: int, seats: int) -> int:
        """Returns how many of the oldest waiting requests to pass to `choose`, for the same `size` and `seats`."""
        return min(MAX_WINDOW, max(seats, int(self.max_overtakes * size)))

    def choose(self, waiting: Sequence[QueuedRequest], seats: int, size: int) -> list[QueuedRequest]:
        """Returns the requests to start next, in order; changes nothing, as not all of them may start.

        Args:
            waiting: waiting requests in order of arrival.
            seats: maximum number of requests to start.
            size: number of requests of a batch.
        """
        left, plan = list(waiting), self._copy()
        chosen: list[QueuedRequest] = []
        vectors = np.stack([request.signature for request in left]) if left else np.empty((0, 0))
        while left and len(chosen) < seats:
            index = plan._next(left, vectors, size)
            chosen.append(left[index])
            plan._start(left, index, size)
            vectors = np.delete(vectors, index, axis=0)
        return chosen

    def started(self, waiting: Sequence[QueuedRequest], names: Collection[str], size: int) -> int:
        """Records which of the requests passed to `choose` have started; returns how many overtook an older one."""
        left, overtakes = list(waiting), 0
        for name in names:
            index = next((index for index, request in enumerate(left) if request.name == name), None)
            if index is not None:
                self._start(left, index, size)
                overtakes += index > 0
        return overtakes

    def forget(self, names: Collection[str]) -> None:
        """Forgets requests that have ended while they waited."""
        for name in names:
            self._overtaken.pop(name, None)

    def _copy(self) -> Self:
        plan = copy(self)
        plan._overtaken = dict(self._overtaken)
        return plan

    def _next(self, left: Sequence[QueuedRequest], vectors: np.ndarray, size: int) -> int:
        if self._total is None or self._overtaken.get(left[0].name, 0) >= self.max_overtakes * size:
            return 0
        return int(np.argmax(vectors @ self._total))

    def _start(self, left: list[QueuedRequest], index: int, size: int) -> None:
        """Starts one request, and removes it from `left`."""
        request = left.pop(index)
        self._overtaken.pop(request.name, None)
        for older in left[:index]:
            self._overtaken[older.name] = self._overtaken.get(older.name, 0) + 1
        self._total = request.signature if self._total is None else self._total + request.signature
        self._count += 1
        if self._count >= size:
            self._total, self._count = None, 0
