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
from vllm_adapmoe.integration.scheduler.stats_outbox import StatsOutbox
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.scheduling.affinity import DecodingRequest, held_back
from vllm_adapmoe.scheduling.arrivals import Arrivals
from vllm_adapmoe.scheduling.costs import StepCosts
from vllm_adapmoe.scheduling.counters import StepCounters
from vllm_adapmoe.scheduling.prefill import WaitingPrompt, hold_prefill
from vllm_adapmoe.scheduling.report import StepReport


class ExpertCacheScheduler(Scheduler):
    """vLLM's scheduler, which additionally holds requests back where that saves fetches.

    It also adds the worker's counters to the step's statistics, and ends requests whose experts cannot be read.
    """

    held_prefill_steps = 0
    """Steps that held waiting prompts back."""
    held_tokens = 0
    """Decode tokens held back, summed over steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outbox = StatsOutbox()
        self.holding = EngineSettings.of(self.vllm_config).config.scheduler
        self.costs = StepCosts()
        self.arrivals = Arrivals()
        self._begun = 0
        """Number of prompts begun, including restarts after preemption."""
        self._report: StepReport | None = None
        """Report of the last step; None until a step has run with a cache."""
        self._expected: dict[str, int] = {}
        self._waiting_since: dict[str, float] = {}
        self._ran_at: dict[str, float] = {}
        config = self.vllm_config
        self._drafts_in_flight = config.speculative_config is not None and config.scheduler_config.async_scheduling
        """Whether steps are scheduled before it is known which draft tokens the step before accepts. vLLM corrects the
        positions of requests in consecutive steps only (`_update_states` of `v1/worker/gpu_model_runner.py`)."""

    # Holding back

    def schedule(self, throttle_prefills: bool = False) -> Any:
        if not self.holding.enabled:
            return super().schedule(throttle_prefills)
        now = time.monotonic()
        if self._report is not None:
            throttle_prefills |= self._hold(now)
        output = super().schedule(throttle_prefills)
        self._begun += len(output.scheduled_new_reqs) + len(output.scheduled_cached_reqs.resumed_req_ids)
        for name in output.num_scheduled_tokens:
            self._ran_at[name] = now
            self._waiting_since.pop(name, None)
        for name in output.finished_req_ids:
            for times in (self._ran_at, self._waiting_since, self._expected):
                times.pop(name, None)
        return output

    def _hold(self, now: float) -> bool:
        """Decides which requests wait for the next step; returns whether waiting prompts do."""
        prefilling = any(request.is_prefill_chunk for request in self.running)
        seats = self.max_num_running_reqs - len(self.running)
        waiting = self._waiting(now, seats)
        self.arrivals.observe(now, self._begun + len(waiting))
        hold = bool(waiting) and not prefilling and self._hold_prefill(waiting, now)
        # A step with a prompt uses nearly all experts anyway, so holding decoding requests back would save nothing.
        tokens = self._hold_decoding(now) if hold or not (prefilling or waiting) else 0
        self.held_prefill_steps += hold
        self.held_tokens += tokens
        if self.log_stats and (hold or tokens):
            self.outbox.add(StepCounters(held_prefill_steps=int(hold), held_tokens=tokens), 0)
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
            self.holding.max_prefill_delay_ms / 1000,
        )

    def _hold_decoding(self, now: float) -> int:
        """Holds decoding requests back for a step by marking them not eligible to vLLM, and returns how many."""
        if self.holding.max_affinity_delay_ms == 0 or len(self.running) < 2 or self._drafts_in_flight:
            return 0
        assert self._report is not None
        requests = {request.request_id: request for request in self.running if _has_token_to_run(request)}
        decoding = [
            DecodingRequest(
                name, self._expected.get(name), now - self._ran_at.setdefault(name, now), self._priority(request)
            )
            for name, request in requests.items()
        ]
        held_requests = held_back(
            decoding,
            self._report.resident,
            self._report.slots,
            self.costs.compute.value or 0.0,
            self.costs.load.value or 0.0,
            # A request held back now is considered again only after this step.
            max(0.0, self.holding.max_affinity_delay_ms / 1000 - self.costs.decode_step),
        )
        for name in held_requests:
            request = requests[name]
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        return len(held_requests)

    # Output of the worker

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = report_of(model_runner_output)
        if self.log_stats and report.counters is not None:
            self.outbox.add(report.counters, scheduler_output.total_num_scheduled_tokens)
        if report.step is not None:
            self._report = report.step
            self._expected |= {name: bits for name, bits in report.step.expected.items() if name in self.requests}
            for times in report.step.times:
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


def _has_token_to_run(request: Request) -> bool:
    """Returns whether vLLM could schedule a token of a running request now.

    With asynchronous scheduling its last token may already be in flight.
    """
    in_flight = request.num_output_placeholders
    if request.num_tokens_with_spec + in_flight <= request.num_computed_tokens:
        return False
    return not in_flight or request.num_computed_tokens + 2 - in_flight < request.num_prompt_tokens + request.max_tokens
