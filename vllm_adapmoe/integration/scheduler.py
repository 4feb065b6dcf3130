"""vLLM's schedulers, heeding what the worker says of its expert cache."""

from collections.abc import Collection
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_adapmoe.integration.stats_outbox import StatsOutbox


class ExpertCacheScheduler(Scheduler):
    """Puts the worker's counters into the statistics of the step, and ends requests whose experts cannot be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outbox = StatsOutbox()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self.log_stats:
            stats = getattr(model_runner_output, "worker_stats", None)
            self.outbox.add(stats, scheduler_output.total_num_scheduled_tokens)
        failed = self._finish_failed(getattr(model_runner_output, "failed_requests", ()))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                )
            )
        return outputs

    def _finish_failed(self, request_ids: Collection[str]) -> list[Request]:
        """Ends requests whose experts could not be read, before anything of their last step is used."""
        known = [request_id for request_id in request_ids if request_id in self.requests]
        for request_id in known:
            # What the step wrote is wrong, and must not be found again as a cached prefix.
            for blocks in self.kv_cache_manager.get_block_ids(request_id):
                self.kv_cache_manager.evict_blocks(set(blocks))
        return self.finish_requests(known, RequestStatus.FINISHED_ERROR) if known else []

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.worker_stats = self.outbox.take(idle=not self.requests)  # type: ignore[attr-defined]
        return stats


class ExpertCacheAsyncScheduler(ExpertCacheScheduler, AsyncScheduler):
    """The same where steps are scheduled ahead."""
