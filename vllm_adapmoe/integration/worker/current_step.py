"""CurrentStep: the step that a worker is running, its requests, and which of them fail in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.integration.compat import requests_of_step
from vllm_adapmoe.scheduling.report import prompt_rows
from vllm_adapmoe.store.base import ExpertsUnavailable

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

Requests = list[tuple[str, int, int]]
"""Id, first position and number of rows of each request of a step, in row order."""


@dataclass
class LaunchedStep:
    """A step that the GPU decides, until the host has read its routing; all but `requests` is for a trace."""

    seconds: float
    """Time of the launch, by a monotonic clock."""
    requests: Requests = field(default_factory=list)
    drafts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """As in `CurrentStep`."""
    expected_at_start: np.ndarray | None = None
    """As in `ExpertPredictor`."""
    traced: HostCopy | None = None
    """`StepTrace.copy` of the step; None: it is not traced."""
    first_layer: HostCopy | None = None
    """Logits of the first layer's experts in the next step, float32 `[requests, experts]`; None: not predicted."""


class CurrentStep:
    """The step that a worker is running.

    Args:
        runner: vLLM's model runner.
        fails_requests: whether requests whose experts cannot be read are ended one by one; otherwise they end the
            engine.
    """

    def __init__(self, runner: Any, fails_requests: bool) -> None:
        self._runner = runner
        self.fails_requests = fails_requests
        self.running = False
        """Whether a step of requests is being launched; False while vLLM profiles, warms up or captures graphs."""
        self.rows: Mapping[str, int] = {}
        """Number of rows of each request of the current or last step."""
        self.tokens = 0
        """Number of rows of all of them, without padding."""
        self.drafts: Mapping[str, Sequence[int]] = {}
        """Draft tokens that the step verifies, of each request that has some: one of its rows each, the last ones."""
        self._output: Any = None
        self._failed: set[str] = set()

    def begin(self, scheduler_output: Any) -> None:
        """Sets the step that is about to run."""
        self._output = scheduler_output
        self.rows = scheduler_output.num_scheduled_tokens
        self.tokens = scheduler_output.total_num_scheduled_tokens
        self.drafts = scheduler_output.scheduled_spec_decode_tokens

    @property
    def prompt_rows(self) -> int:
        """Number of rows of the step that belong to prompts."""
        return prompt_rows(self.rows, self.drafts)

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Surrounds the launch of the step."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def requests(self) -> Requests:
        """Returns id, first position and number of rows of each request, in row order."""
        return requests_of_step(self._runner, self._output)

    def fail(self, failed_tokens: torch.Tensor, error: ExpertsUnavailable) -> None:
        """Marks the requests of failed rows, whose experts cannot be read, to be ended with this step.

        Args:
            failed_tokens: bool `[rows]`.
            error: the reason, for the log.
        """
        row = 0
        for name, _, rows in self.requests():
            if failed_tokens[row : row + rows].any():
                self._fail(name, error)
            row += rows

    def fail_all(self, reason: str) -> None:
        """Marks every request of the step to be ended with it."""
        for name in self.rows:
            self._fail(name, reason)

    def _fail(self, name: str, reason: object) -> None:
        if name not in self._failed:
            logger.error("Expert cache: request %s fails: %s", name, reason)
            self._failed.add(name)

    def take_failed(self) -> tuple[str, ...]:
        """Returns the requests to be ended, in order of their ids, and forgets them."""
        failed, self._failed = tuple(sorted(self._failed)), set()
        return failed
