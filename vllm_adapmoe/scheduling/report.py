"""WorkerReport: what a worker reports to the scheduler with every step's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_adapmoe.scheduling.counters import StepCounters


@dataclass(frozen=True)
class StepTimes:
    """Duration of one step, and its waits for experts.

    `seconds` is from the first kernel of the step to its last, by the device's clock; the waits are the host's. A
    layer driven by the host waits for experts after it has read the routing, when the device has nothing left to run:
    such a wait is idle time of the device too, and part of `seconds`. In steps that a GPU
    decides, they are estimated (`CacheStats.stall_seconds`), one or two steps late.
    """

    seconds: float
    """Seconds that the model ran, waits for experts included."""
    stall_seconds: float
    """Seconds of those spent waiting for experts."""
    prefill: bool
    """Whether the step ran a prompt or a part of one."""


@dataclass(frozen=True)
class WorkerReport:
    """Everything that a worker reports with a step's output."""

    counters: StepCounters | None = None
    """None: nothing was counted."""
    failed_requests: tuple[str, ...] = ()
    """Requests to be ended, because experts that they need cannot be read."""
    times: Sequence[StepTimes] = ()
    """Times of the steps that have ended since the last report, in order: on the CPU this step, on a GPU earlier ones,
    since this one has only been launched. Empty without a cache, or with `scheduler.enabled=false`."""


def prompt_rows(rows: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> int:
    """Returns the number of rows of a step that belong to a prompt or a part of one.

    A decoding request has one row for its last token and one for each draft token that the step verifies.

    Args:
        rows: number of rows of each request.
        drafts: draft tokens of each request that has some.
    """
    return sum(count for name, count in rows.items() if count > 1 + len(drafts.get(name, ())))
