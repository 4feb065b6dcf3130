"""Estimates the costs of steps from the steps that were run."""

from vllm_adapmoe.scheduling.report import StepTimes

RATE = 0.1
"""Rate of the exponential means: the last ten steps or so of a kind."""


class Mean:
    """Exponential mean that starts as an arithmetic one; None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        rate = max(RATE, 1 / self.count)
        self.value = value if self.value is None else self.value + rate * (value - self.value)


class StepCosts:
    """Mean costs of a worker's steps, in seconds."""

    def __init__(self) -> None:
        self.compute = Mean()
        """Seconds of a decode step, without waits for experts."""
        self.decode = Mean()
        """Seconds of waits for experts in a decode step after another one."""
        self.sweep = Mean()
        """Seconds of waits in a step with a prompt and in the decode step after it, whose experts it has evicted."""
        self._prompt_stall: float | None = None
        """Seconds of waits of the last step, if it ran a prompt."""

    def observe(self, step: StepTimes) -> None:
        """Updates the means with one step; call in the order in which steps ran."""
        prompt_stall, self._prompt_stall = self._prompt_stall, step.stall_seconds if step.prefill else None
        if step.prefill:
            if prompt_stall is not None:  # one prompt's chunks in a row, or one prompt after the other
                self.sweep.add(prompt_stall)
            return
        self.compute.add(max(0.0, step.seconds - step.stall_seconds))  # two clocks: the difference may be below zero
        if prompt_stall is None:
            self.decode.add(step.stall_seconds)
        else:
            decode = 0.0 if self.decode.value is None else self.decode.value
            self.sweep.add(prompt_stall + max(0.0, step.stall_seconds - decode))

    @property
    def surcharge(self) -> float:
        """Additional seconds that a step waits for experts because it runs a prompt; 0 while unknown."""
        if self.sweep.value is None or self.decode.value is None:
            return 0.0
        return max(0.0, self.sweep.value - self.decode.value)

    @property
    def stall_share(self) -> float:
        """Share of a decode step that waits for experts; 0 while unknown."""
        stall = self.decode.value or 0.0
        return stall / (stall + (self.compute.value or 0.0)) if stall else 0.0
