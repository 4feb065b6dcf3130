"""When waiting prompts should run."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A request whose prompt has not begun to run."""

    waited: float
    """Seconds since it could have begun."""
    tokens: int
    """Of its prompt."""
    priority: int = 0
    """vLLM's: less is more urgent."""


def hold_prefill(
    waiting: Sequence[Waiting],
    decoding: Sequence[int],
    surcharge: float,
    gap: float,
    token_budget: int,
    max_delay: float,
) -> bool:
    """Whether the waiting prompts should wait for one more, to share one sweep over the experts.

    A step with a prompt makes every decoding request wait `surcharge` seconds, whether it runs one prompt or several.
    If n prompts share each sweep, a prompt costs `decoding * surcharge / n` seconds for that and waits
    `gap * (n - 1) / 2` for the others. One more pays while `gap * n * (n + 1) / 2 < decoding * surcharge`. To begin at
    such a number is the best that can be done with arrivals of which nothing but their rate is known (Deb and Serfozo,
    "Optimal control of batch service queues", 1973; the costs are ours).

    Args:
        waiting: those that could begin to run, in no order.
        decoding: priorities of the requests that are decoding.
        surcharge: seconds.
        gap: seconds between two prompts that could begin.
        token_budget: of a step; more prompt tokens than that do not share one.
        max_delay: seconds that none of them waits longer.
    """
    if not waiting or not decoding or max(one.waited for one in waiting) >= max_delay:
        return False
    if sum(one.tokens for one in waiting) >= token_budget:
        return False
    if min(one.priority for one in waiting) < max(decoding):  # it should not wait for the sake of less urgent ones
        return False
    return gap * len(waiting) * (len(waiting) + 1) / 2 < len(decoding) * surcharge
