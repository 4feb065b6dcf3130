"""Chooses the decoding requests that a step delays, to save expert fetches."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_TIME_RATIO = 0.9
"""Maximum time per token without the delayed requests, relative to that with all requests. Times are estimates, and a
delayed request gets its tokens less evenly: for a gain of less than a tenth no request is delayed."""


@dataclass(frozen=True)
class DecodingRequest:
    """A request that could get its next token in this step."""

    name: str
    expected: int | None
    """Bit mask of the experts that the token is expected to use; None: unknown."""
    waited: float
    """Seconds since the request was last part of a step."""
    priority: int = 0
    """vLLM's priority: lower is more urgent."""


def held_back(
    decoding: Sequence[DecodingRequest],
    resident: int,
    slots: int,
    compute: float,
    load: float,
    max_delay: float,
) -> set[str]:
    """Returns the requests to delay, because their experts would evict those of the others.

    While all experts that the batch is expected to use fit, a missing one is fetched once, and delaying saves nothing.
    Beyond that, a step with the experts U costs about `compute + load * max(missing, |U| - slots)` seconds: the missing
    ones, or those evicted and fetched again in every step. Requests are ordered by their missing experts; the step
    takes the number with the most tokens per second, or all, if that is not much worse. (Ours.)

    Args:
        decoding: requests that could be part of the step, in the scheduler's order.
        resident: bit mask of the resident experts.
        slots: slots of the cache.
        compute: seconds of a step without fetches.
        load: seconds of one fetch.
        max_delay: seconds after which a request is not delayed any more, whatever it costs.
    """
    all_expected = 0
    for request in decoding:
        all_expected |= request.expected or 0
    if max_delay <= 0 or all_expected.bit_count() <= slots:
        return set()
    due = [request for request in decoding if request.expected is None or request.waited >= max_delay]
    names = {request.name for request in due}
    deferrable = [request for request in decoding if request.name not in names]
    deferrable.sort(key=lambda request: (request.priority, ((request.expected or 0) & ~resident).bit_count()))
    union = 0
    for request in due:
        union |= request.expected or 0

    def seconds_per_token(union: int, tokens: int) -> float:
        return (compute + load * max((union & ~resident).bit_count(), union.bit_count() - slots)) / tokens

    best, num_run = (seconds_per_token(union, len(due)), 0) if due else (float("inf"), 0)
    for count, request in enumerate(deferrable, 1):
        union |= request.expected or 0
        seconds = seconds_per_token(union, len(due) + count)
        if seconds <= best:
            best, num_run = seconds, count
    if best > MAX_TIME_RATIO * seconds_per_token(all_expected, len(decoding)):
        return set()
    return {request.name for request in deferrable[num_run:]}
