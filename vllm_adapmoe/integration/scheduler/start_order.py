"""StartOrder: reorders vLLM's waiting requests, so that requests with similar texts run together."""

from collections.abc import Collection
from itertools import islice, takewhile

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from vllm_adapmoe.scheduling.batches import Batches, QueuedRequest
from vllm_adapmoe.scheduling.costs import Mean
from vllm_adapmoe.scheduling.text_signatures import TextSignatures

MAX_STARTS = 16
"""Maximum number of requests that a step reorders; seats may be many more than the KV cache has room for."""


class StartOrder:
    """Moves the requests that `Batches` chooses to the front of vLLM's queue, in each step.

    Args:
        max_overtakes: see `Batches`.
    """

    def __init__(self, max_overtakes: float) -> None:
        self.batches = Batches(max_overtakes)
        self.texts = TextSignatures()
        self._queued: dict[str, tuple[QueuedRequest, int]] = {}
        """Waiting requests, and the number of texts that were known when each was given its signature."""
        self._running: dict[str, Request] = {}
        self._waiting: list[QueuedRequest] = []
        """Requests that the last `arrange` has looked at, in order of arrival."""
        self._running_mean = Mean()
        self._size = 0
        """Number of requests of a batch, at the last `arrange`."""

    def arrange(self, queue: RequestQueue, seats: int) -> None:
        """Puts the chosen requests first, after preempted ones.

        Args:
            queue: vLLM's queue in order of arrival.
            seats: number of requests that could start.
        """
        ahead = list(takewhile(lambda request: not _is_new(request), queue))
        seats = min(seats, MAX_STARTS)
        # Not the number that run now: many may just have ended.
        self._size = max(1, round(self._running_mean.value or seats))
        window = islice(queue, len(ahead), len(ahead) + self.batches.window(self._size, seats))
        requests = {request.request_id: request for request in window if _is_new(request)}
        # Requests that were put first and did not start are not where they arrived.
        names = sorted(requests, key=lambda name: requests[name].arrival_time)
        self._waiting = [self._queue(requests[name]) for name in names]
        chosen = [requests[request.name] for request in self.batches.choose(self._waiting, seats, self._size)]
        if chosen != list(islice(queue, len(ahead), len(ahead) + len(chosen))):
            queue.remove_requests(ahead + chosen)
            for request in reversed(ahead + chosen):
                queue.prepend_request(request)

    def _queue(self, request: Request) -> QueuedRequest:
        name = request.request_id
        queued = self._queued.get(name)
        # A burst on a new server has arrived before any text is known; doubling bounds how often a text is read again.
        if queued is None or self.texts.count >= 2 * max(1, queued[1]):
            queued = QueuedRequest(name, self.texts.signature(request.all_token_ids)), self.texts.count
            self._queued[name] = queued
        return queued[0]

    def scheduled(self, requests: Collection[Request], running: int) -> int:
        """Records a scheduled step; returns how many requests that start with it overtook an older one.

        Args:
            requests: requests that start with the step.
            running: number of running requests, including them.
        """
        self._running_mean.add(running)
        names = [request.request_id for request in requests]
        overtakes = self.batches.started(self._waiting, names, self._size)
        self._waiting = []
        self._running |= {request.request_id: request for request in requests}
        return overtakes

    def ended(self, names: Collection[str]) -> None:
        """Forgets requests that have ended, and learns from the texts of those that ran."""
        self.batches.forget(names)
        for name in names:
            self._queued.pop(name, None)
            request = self._running.pop(name, None)
            if request is not None:
                self.texts.learn(request.all_token_ids)


def _is_new(request: Request) -> bool:
    """Returns whether a waiting request could start and never has."""
    return request.status == RequestStatus.WAITING and not request.num_computed_tokens
