"""Decides when waiting prompts should run."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingPrompt:
    """A request whose prompt has not started to run."""

    waited: float
    """Seconds since the prompt could have started."""
    tokens: int
    """Number of prompt tokens."""
    priority: int = 0
    """vLLM's priority: lower is more urgent."""


def hold_prefill(
    waiting: Sequence[WaitingPrompt],
    decoding: Sequence[int],
    surcharge: float,
    gap: float,
    token_budget: int,
    max_delay: float,
) -> bool:
    """Returns whether the waiting prompts should wait for one more, to share one sweep over the experts.

    A step with a prompt delays every decoding request by `surcharge` seconds, whether it runs one prompt or several. If
    n prompts share each sweep, a prompt costs `decoding * surcharge / n` seconds for that and waits `gap * (n - 1) / 2`
    for the others. Waiting for one more pays off while `gap * n * (n + 1) / 2 < decoding * surcharge`. Starting at such
    a number is optimal for arrivals of which only the rate is known (Deb and Serfozo, "Optimal control of batch service
    queues", 1973; the costs are ours).

    Args:
        waiting: prompts that could start, in any order.
        decoding: priorities of the decoding requests.
        surcharge: additional seconds of a step with a prompt.
        gap: mean seconds between two prompts that could start.
        token_budget: token budget of a step; more prompt tokens than that do not share one.
        max_delay: maximum seconds that a prompt waits.
    """
    if not waiting or not decoding or max(prompt.waited for prompt in waiting) >= max_delay:
        return False
    if sum(prompt.tokens for prompt in waiting) >= token_budget:
        return False
    if min(prompt.priority for prompt in waiting) < max(decoding):  # no waiting for less urgent requests
        return False
    return gap * len(waiting) * (len(waiting) + 1) / 2 < len(decoding) * surcharge
