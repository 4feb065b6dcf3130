"""What steps cost, learnt from the steps that were run."""

from vllm_adapmoe.scheduling.report import StepTimes

RATE = 0.1
"""Of exponential means: the last ten steps or so of a kind."""


class Mean:
    """Exponential mean that starts as a plain one; None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        rate = max(RATE, 1 / self.count)
        self.value = value if self.value is None else self.value + rate * (value - self.value)


class StepPrices:
    """Means over a worker's steps, in seconds."""

    def __init__(self) -> None:
        self.compute = Mean()
        """Of a decode step, waits for experts apart."""
        self.load = Mean()
        """Of one expert's fetch."""
        self.decode = Mean()
        """Waits of a decode step after another one."""
        self.sweep = Mean()
        """Waits of a step with a prompt and of the decode step after it, which finds its experts gone."""
        self._swept: float | None = None
        """Waits of the step with a prompt that was the last one."""

    def observe(self, step: StepTimes) -> None:
        """Takes in one step, in the order in which they ran."""
        if step.loads:
            self.load.add(step.fetch_seconds / step.loads)
        swept, self._swept = self._swept, step.stall_seconds if step.prefill else None
        if step.prefill:
            if swept is not None:  # one prompt's chunks in a row, or one prompt after the other
                self.sweep.add(swept)
            return
        self.compute.add(max(0.0, step.seconds - step.stall_seconds))  # two clocks: the difference may be below zero
        if swept is None:
            self.decode.add(step.stall_seconds)
        else:
            decode = 0.0 if self.decode.value is None else self.decode.value
            self.sweep.add(swept + max(0.0, step.stall_seconds - decode))

    @property
    def surcharge(self) -> float:
        """Seconds that a step waits longer for experts because a prompt runs with it; 0 while it is not known."""
        if self.sweep.value is None or self.decode.value is None:
            return 0.0
        return max(0.0, self.sweep.value - self.decode.value)

    @property
    def decode_step(self) -> float:
        """Seconds of a decode step; 0 while it is not known."""
        return (self.compute.value or 0.0) + (self.decode.value or 0.0)
