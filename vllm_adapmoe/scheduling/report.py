"""What a worker says of its expert cache after every step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """Of one step. Sets of experts are the bits of an integer: the union of a batch is then one operation a request."""

    slots: int
    """Of the cache."""
    resident: int
    """Experts that need no fetch."""
    expected: dict[str, int]
    """Of each request of the step, experts that its next token is expected to use, over all layers."""
    seconds: float
    """That the model ran, waits for experts included."""
    stall_seconds: float
    """Of those, waiting for experts."""
    loads: int
    """Experts fetched, on demand or ahead."""
    fetch_seconds: float
    """With a fetch under way."""
