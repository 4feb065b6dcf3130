"""What a worker says of its expert cache after every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """How long one step took, and what of that it waited for.

    `seconds` is from the first kernel of the step to its last, by the device's clock. The others are the host's. A
    layer of a step that the host drives waits for experts only after it has read what the router chose, when the
    device has nothing left to run: such a wait is idle time of the device as well, and part of `seconds`. Steps that
    read experts in place do not wait.
    """

    seconds: float
    """That the model ran, waits for experts included."""
    stall_seconds: float
    """Of those, waiting for experts."""
    loads: int
    """Experts fetched, on demand or ahead."""
    fetch_seconds: float
    """With a fetch under way, until its bytes were in the slot."""
    prefill: bool
    """It ran a prompt, or a part of one."""


@dataclass(frozen=True)
class StepReport:
    """Of one step that has been launched.

    Sets of experts are the bits of an integer: the union of a batch is then one operation a request.
    """

    slots: int
    """Of the cache."""
    resident: int
    """Experts that need no fetch."""
    expected: dict[str, int]
    """Of each request of the step, experts that its next token is expected to use, over all layers."""
    times: Sequence[StepTimes] = ()
    """Of steps that have ended since the last report, in order: of this one on the CPU; on a GPU of earlier ones, for
    this one has only been launched."""


def runs_prompt(rows: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> bool:
    """Whether a step with so many rows of each request, and these draft tokens, runs a prompt or a part of one."""
    return any(count > 1 + len(drafts.get(name, ())) for name, count in rows.items())
