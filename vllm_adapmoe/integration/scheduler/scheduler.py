"""vLLM's schedulers, extended to use the worker's reports about its expert cache."""

import time
from collections.abc import Collection
from itertools import islice
from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_adapmoe.integration.reported_output import report_of
from vllm_adapmoe.integration.scheduler.start_order import StartOrder
from vllm_adapmoe.integration.scheduler.stats_outbox import StatsOutbox
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.scheduling.arrivals import Arrivals
from vllm_adapmoe.scheduling.costs import StepCosts
from vllm_adapmoe.scheduling.counters import StepCounters
from vllm_adapmoe.scheduling.prefill import WaitingPrompt, hold_prefill

MIN_STALL_SHARE = 0.1
"""Minimum share of a decode step that waits for experts. Below it the order of requests could gain no more than that,
and requests start in order of arrival."""


class ExpertCacheScheduler(Scheduler):
    """vLLM's scheduler, which additionally decides when and in which order requests start, to save fetches.

    It also adds the worker's counters to the step's statistics, and ends requests whose experts cannot be read.
    """

    held_prefill_steps = 0
    """Steps that held waiting prompts back."""
    overtakes = 0
    """Requests that started before an older one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outbox = StatsOutbox()
        self.settings = EngineSettings.of(self.vllm_config).config.scheduler
        self.costs = StepCosts()
        self.arrivals = Arrivals()
        self._begun = 0
        """Number of prompts begun, including restarts after preemption."""
        self._waiting_since: dict[str, float] = {}
        self.order: StartOrder | None = None
        """None: requests start in vLLM's order, of arrival or by priority."""
        if self.settings.max_overtakes and self.policy == SchedulingPolicy.FCFS:
            self.order = StartOrder(self.settings.max_overtakes)

    # Starting requests

    def schedule(self, throttle_prefills: bool = False) -> Any:
        if not self.settings.enabled:
            return super().schedule(throttle_prefills)
        now = time.monotonic()
        seats = self.max_num_running_reqs - len(self.running)
        throttle_prefills |= self._hold(now, seats)
        if self.order is not None and not throttle_prefills and seats > 0 and self._waits_for_experts:
            self.order.arrange(self.waiting, seats)
        output = super().schedule(throttle_prefills)
        self._begun += len(output.scheduled_new_reqs) + len(output.scheduled_cached_reqs.resumed_req_ids)
        for name in output.num_scheduled_tokens:
            self._waiting_since.pop(name, None)
        for name in output.finished_req_ids:
            self._waiting_since.pop(name, None)
        if self.order is not None:
            begun = [self.requests[new.req_id] for new in output.scheduled_new_reqs]
            self._count_overtakes(self.order.scheduled(begun, len(self.running)))
            self.order.ended(output.finished_req_ids)
        return output

    @property
    def _waits_for_experts(self) -> bool:
        return self.costs.stall_share > MIN_STALL_SHARE

    def _count_overtakes(self, overtakes: int) -> None:
        self.overtakes += overtakes
        if self.log_stats and overtakes:
            self.outbox.add(StepCounters(overtakes=overtakes), 0)

    def _hold(self, now: float, seats: int) -> bool:
        """Returns whether waiting prompts wait for the next step."""
        prefilling = any(request.is_prefill_chunk for request in self.running)
        waiting = self._waiting(now, seats)
        self.arrivals.observe(now, self._begun + len(waiting))
        hold = bool(waiting) and not prefilling and self._hold_prefill(waiting, now)
        self.held_prefill_steps += hold
        if self.log_stats and hold:
            self.outbox.add(StepCounters(held_prefill_steps=1), 0)
        return hold

    def _waiting(self, now: float, seats: int) -> list[WaitingPrompt]:
        """Returns the waiting requests that could start now."""
        return [
            WaitingPrompt(
                now - self._waiting_since.setdefault(request.request_id, now),
                request.num_tokens,
                self._priority(request),
            )
            for request in islice(self.waiting, seats)
        ]

    def _priority(self, request: Request) -> int:
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _hold_prefill(self, waiting: list[WaitingPrompt], now: float) -> bool:
        return hold_prefill(
            waiting,
            [self._priority(request) for request in self.running],
            self.costs.surcharge,
            self.arrivals.gap(now),
            # A decoding request takes a row for its last token, and one for each draft token.
            self.max_num_scheduled_tokens - sum(1 + len(request.spec_token_ids) for request in self.running),
            self.settings.max_prefill_delay_ms / 1000,
        )

    # Output of the worker

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = report_of(model_runner_output)
        if self.log_stats and report.counters is not None:
            self.outbox.add(report.counters, scheduler_output.total_num_scheduled_tokens)
        for times in report.times:
            self.costs.observe(times)
        failed = self._finish_failed(report.failed_requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            client_outputs = outputs.setdefault(request.client_index, EngineCoreOutputs())
            client_outputs.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                )
            )
        return outputs

    def _finish_failed(self, request_ids: Collection[str]) -> list[Request]:
        """Ends requests whose experts could not be read, before any output of their last step is used."""
        known_ids = [request_id for request_id in request_ids if request_id in self.requests]
        for request_id in known_ids:
            # The step wrote wrong values, which must not be reused as a cached prefix.
            for blocks in self.kv_cache_manager.get_block_ids(request_id):
                self.kv_cache_manager.evict_blocks(set(blocks))
        return self.finish_requests(known_ids, RequestStatus.FINISHED_ERROR) if known_ids else []

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.worker_stats = self.outbox.take(idle=not self.requests)  # type: ignore[attr-defined]
        return stats


class ExpertCacheAsyncScheduler(ExpertCacheScheduler, AsyncScheduler):
    """`ExpertCacheScheduler` for asynchronous scheduling, where steps are scheduled ahead."""


def is_cache_aware(scheduler_cls: Any) -> bool:
    """Returns whether a scheduler, given as class or name, handles the worker's reports."""
    cls = resolve_obj_by_qualname(scheduler_cls) if isinstance(scheduler_cls, str) else scheduler_cls
    return isinstance(cls, type) and issubclass(cls, ExpertCacheScheduler)
