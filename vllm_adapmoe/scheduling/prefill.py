"""When waiting prompts should run."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A request whose prompt has not begun to run."""

    waited: float
    """Seconds."""
    tokens: int
    """Of its prompt."""
    priority: int = 0
    """vLLM's: less is more urgent."""


def hold_prefill(
    waiting: Sequence[Waiting],
    decoding: Sequence[int],
    surcharge: float,
    token_budget: int,
    seats: int,
    max_delay: float,
) -> bool:
    """Whether the waiting prompts should wait for others, to share one sweep over the experts.

    A step with a prompt makes every decoding request wait `surcharge` seconds, whether it runs one prompt or several.
    Waiting costs the prompts what they have waited. They are held until both are equal, which never costs more than
    twice of what knowing all arrivals in advance would (it is the acknowledgement of packets of Dooly, Goldman and
    Scott, "TCP dynamic acknowledgment delay", STOC 1998, with sweeps for acknowledgements).

    Args:
        waiting: in no order.
        decoding: priorities of the requests that are decoding.
        surcharge: seconds.
        token_budget: of a step; more prompt tokens than that do not share one.
        seats: requests that can still begin to run.
        max_delay: seconds that none of them waits longer.
    """
    if not waiting or not decoding or surcharge <= 0:
        return False
    if max(one.waited for one in waiting) >= max_delay or len(waiting) >= seats:
        return False
    if sum(one.tokens for one in waiting) >= token_budget:
        return False
    if min(one.priority for one in waiting) < max(decoding):  # it should not wait for the sake of less urgent ones
        return False
    return sum(one.waited for one in waiting) < len(decoding) * surcharge
