"""Which decoding requests a step should leave out."""

from collections.abc import Sequence
from dataclasses import dataclass

WORTH = 0.9
"""Of a token's price with everybody, the most that it may be without those held back. Prices are estimates, and a
request that is held gets its tokens less evenly: for less than a tenth nobody waits."""


@dataclass(frozen=True)
class Decoding:
    """A request that could get its next token in this step."""

    name: str
    expected: int | None
    """Bits of the experts that the token is expected to use; None: nothing is known."""
    waited: float
    """Seconds since it was last part of a step."""
    priority: int = 0
    """vLLM's: less is more urgent."""


def held_back(
    decoding: Sequence[Decoding],
    resident: int,
    slots: int,
    compute: float,
    load: float,
    max_delay: float,
) -> set[str]:
    """Requests whose experts are in the way of the others': they wait while the others' are there.

    While everything that the batch is expected to use fits, a missing expert is fetched once, and waiting would save
    nothing. Beyond that, a step with the experts U costs about `compute + load * max(missing, |U| - slots)` seconds:
    what is missing now, or what has to leave and come back every time. Of the requests ordered by what each of them
    misses, the step takes as many as give the most tokens a second, or all, if that is not much worse. (Ours.)

    Args:
        decoding: all that could be part of the step, in the scheduler's order.
        resident: bits of the experts that are there.
        slots: of the cache.
        compute: seconds of a step without fetches.
        load: seconds of one fetch.
        max_delay: seconds; one that has waited that long is part of the step, whatever it costs.
    """
    everything = 0
    for one in decoding:
        everything |= one.expected or 0
    if max_delay <= 0 or everything.bit_count() <= slots:
        return set()
    due = [one for one in decoding if one.expected is None or one.waited >= max_delay]
    names = {one.name for one in due}
    others = [one for one in decoding if one.name not in names]
    others.sort(key=lambda one: (one.priority, ((one.expected or 0) & ~resident).bit_count()))
    union = 0
    for one in due:
        union |= one.expected or 0

    def seconds_per_token(union: int, tokens: int) -> float:
        return (compute + load * max((union & ~resident).bit_count(), union.bit_count() - slots)) / tokens

    best, taken = (seconds_per_token(union, len(due)), 0) if due else (float("inf"), 0)
    for number, one in enumerate(others, 1):
        union |= one.expected or 0
        price = seconds_per_token(union, len(due) + number)
        if price <= best:
            best, taken = price, number
    if best > WORTH * seconds_per_token(everything, len(decoding)):
        return set()
    return {one.name for one in others[taken:]}
