"""vLLM's schedulers, passing on what the worker says of its expert cache."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class ExpertCacheScheduler(Scheduler):
    """Puts the worker's counters into the statistics of the step."""

    worker_stats: dict[str, float] | None = None

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self.worker_stats = getattr(model_runner_output, "worker_stats", None)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.worker_stats = self.worker_stats  # type: ignore[attr-defined]
        return stats


class ExpertCacheAsyncScheduler(ExpertCacheScheduler, AsyncScheduler):
    """The same where steps are scheduled ahead."""
