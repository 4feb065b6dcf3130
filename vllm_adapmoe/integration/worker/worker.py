"""vLLM's GPU and CPU workers, extended by an expert cache."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.gating.loss_budget import LossBudget
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.entry.compat import adapmoe_settings, gating_settings, heads_settings, requests_of_step
from vllm_adapmoe.integration.entry.compile_key import note_what_is_traced
from vllm_adapmoe.integration.entry.switch import is_cache_aware
from vllm_adapmoe.integration.layers import gates
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts
from vllm_adapmoe.integration.loading.expert_loading import expert_loading, slots_device
from vllm_adapmoe.integration.loading.kv_room import room_for_kv_cache
from vllm_adapmoe.integration.measure.probed_worker import ProbedWorker
from vllm_adapmoe.integration.worker.device_only_steps import DeviceOnlySteps
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor, layers_ahead
from vllm_adapmoe.integration.worker.routers import Routers
from vllm_adapmoe.integration.worker.step_clock import StepClock
from vllm_adapmoe.integration.worker.updated_worker import UpdatedWorker
from vllm_adapmoe.integration.worker.worker_stats import CounterDelta, StepStats, total_stats, with_attributes
from vllm_adapmoe.policy.controller import CacheController, CacheSetup
from vllm_adapmoe.prefetch.heads import NextTokenHeads
from vllm_adapmoe.prefetch.request_experts import RequestExperts, bits
from vllm_adapmoe.scheduling.report import StepReport, StepTimes, runs_prompt
from vllm_adapmoe.simulate.trace import TraceInfo, TraceWriter
from vllm_adapmoe.store.base import ExpertsUnavailable
from vllm_adapmoe.units import GiB

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker
else:
    CPUWorker = object

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def slot_bytes(cache: ExpertCacheManager) -> int:
    """Returns the bytes of all slots."""
    return sum(pool.nbytes for pool in cache.pools)


class ExpertCacheWorker(UpdatedWorker, ProbedWorker, Worker):
    """Mixin that builds the expert cache while the model loads, and reports its activity after every step."""

    expert_cache: ExpertCacheManager | None = None
    moe_layers: list[CachedExperts]
    _step_report: StepReport | None
    """Report of the current step, until it is sent with the step's output."""
    predictor: ExpertPredictor | None = None
    device_only: DeviceOnlySteps | None = None
    """Steps and layers that run without the host; None on the CPU and with stock layers."""
    _warming_up = False
    """Whether vLLM is running warm-up steps."""

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model and allocates its slots, before vLLM profiles memory: the KV cache gets what they leave."""
        config = self._config = AdapMoEConfig.parse(adapmoe_settings(self.vllm_config))
        self._step_report, self._since, self._clock = None, CounterDelta(), StepClock(slots_device())
        self._made_up = self.vllm_config.load_config.load_format == "dummy"
        with expert_loading(config, self.vllm_config) as loading:
            super().load_model(**kwargs)
            self.expert_cache = loading.finish(self.model_runner.get_model())
        self.moe_layers, self._loading = loading.layers, loading
        self._set_gating(gating_settings(self.vllm_config))
        self.device_only = DeviceOnlySteps.of(self.vllm_config, self.moe_layers, self.expert_cache)
        heads = heads_settings(self.vllm_config)
        self.heads = None
        if heads is not None:
            self.heads = NextTokenHeads.load(Path(heads["path"]), heads["hash"], *heads["shape"])
            self.heads.check([layer.hidden_size for layer in self.moe_layers], self.model_config.get_hidden_size())
        self._look_ahead(config)
        model = self.model_runner.get_model()
        note_what_is_traced(self.vllm_config, model, self.moe_layers, self.device_only is not None)
        self._runs_stock_layers = all(layer.is_stock for layer in self.moe_layers)
        self._hook_compute_logits()
        self.guard_weights()
        group = get_tp_group()
        self.step_stats = StepStats(
            self.expert_cache, self.moe_layers, group.cpu_group if group.world_size > 1 else None
        )
        self._failed: set[str] = set()
        # Other ranks, or another scheduler, would not know of the failure and would continue the request.
        self._fails_requests = self.vllm_config.parallel_config.world_size == 1 and is_cache_aware(
            self.vllm_config.scheduler_config.scheduler_cls
        )
        if self._fails_requests:
            for layer in self.moe_layers:
                layer.on_failure = self._fail_requests
        if self.expert_cache is not None:
            cache = self.expert_cache
            experts = sum(cache.controller.num_held)
            logger.info(
                "Expert cache: %d slots (%.2f GiB) for %d experts, backed by the %s store",
                cache.num_slots, slot_bytes(cache) / GiB, experts, loading.store_kind,
            )  # fmt: skip

    def _look_ahead(self, config: AdapMoEConfig) -> None:
        """Starts prediction, prefetch and trace recording as configured, replacing the previous predictor."""
        if self.predictor is not None:
            self.predictor.close()
        self.predictor = self._start_predictor(config)
        if self.predictor is not None:
            dtype: Any = self.model_config.dtype
            self.predictor.prepare(dtype, slots_device())
        for layer in self.moe_layers:
            layer.predictor = self.predictor

    def _start_predictor(self, config: AdapMoEConfig) -> ExpertPredictor | None:
        cache = self.expert_cache
        prefetching = cache is not None and cache.controller.planner is not None
        rank = get_tensor_model_parallel_rank()
        trace = None
        if config.trace_out is not None and rank == 0:
            experts = [layer.local_num_experts for layer in self.moe_layers]
            shape = CacheShape(
                experts, max(layer.top_k for layer in self.moe_layers), [0] * len(experts), [0] * len(experts)
            )
            if cache is not None:
                shape = cache.controller.shape
            info = TraceInfo(
                model=self.model_config.model,
                num_experts=list(shape.num_experts),
                top_k=shape.top_k,
                lookahead=layers_ahead(config.prefetch, tracing=True),
                expert_bytes=list(shape.expert_bytes),
                pool_of=list(shape.pool_of),
            )
            trace = TraceWriter(Path(config.trace_out), info, config.trace_mib << 20)
        request_experts = None
        if cache is not None and (prefetching or config.scheduler.enabled):
            shape = cache.controller.shape
            request_experts = RequestExperts(len(shape.num_experts), max(shape.num_experts), shape.top_k)
        heads = first = None
        if self.heads is not None:
            by_next_token = cache is not None and config.eviction in ("auto", "next_token")
            if trace is not None or request_experts is not None or by_next_token:
                heads = self.heads.layers
            if trace is not None or (prefetching and config.prefetch.first_layer):
                first = self.heads.first
        if request_experts is None and trace is None and heads is None:
            return None
        runners = self.vllm_config.compilation_config.static_forward_context
        return ExpertPredictor(
            self.moe_layers,
            Routers(self.moe_layers, self.model_runner.get_model(), runners),
            cache if prefetching else None,
            layers_ahead(config.prefetch, trace is not None),
            heads,
            first,
            request_experts,
            trace,
            self._requests_of_step,
        )

    def _hook_compute_logits(self) -> None:
        """Passes the predictor the hidden states that tokens are sampled from, as soon as they are computed."""
        model: Any = self.model_runner.get_model()
        self._awaits_logits = False
        compute_logits = getattr(model, "compute_logits", None)
        if compute_logits is None:  # pooling models sample no token, and some lack this method
            return

        def watched(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._awaits_logits and self.predictor is not None:  # later calls are for prompt logprobs
                self._awaits_logits = False
                self.predictor.end_step(hidden)
            return compute_logits(hidden, *args, **kwargs)

        model.compute_logits = watched

    def _requests_of_step(self) -> list[tuple[str, int, int]]:
        """Returns id, first position and number of rows of each request of the current step."""
        return requests_of_step(self.model_runner, self._scheduler_output)

    def set_gating(self, plan: dict[str, Any] | None) -> None:
        """Gates every layer by the plan (`GatingPlan`, as a dict) from the next step on; None: no gating.

        Entries of the prefix cache stay as they were computed.

        Raises:
            AdapMoEError: the model was compiled or captured without gating, or the plan is for other layers.
        """
        if plan is not None and self._runs_stock_layers and not self.model_config.enforce_eager:
            raise AdapMoEError(
                "gating is not in the compiled model of an engine that started without it, with every expert resident; "
                "start it with gating, or with enforce_eager=True"
            )
        self._set_gating(plan)

    def _set_gating(self, plan: dict[str, Any] | None) -> None:
        parsed = None if plan is None else GatingPlan(**plan)
        if parsed is not None and len(parsed.sensitivity) != len(self.moe_layers):
            raise AdapMoEError(
                f"the gating plan is for {len(parsed.sensitivity)} MoE layers, this worker has {len(self.moe_layers)}"
            )
        in_place = self.device_only is not None and self.device_only.in_place is not None
        if in_place and self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            raise AdapMoEError("gating is part of the CUDA graphs that decode=in_place has captured; set decode=fetch")
        for index, layer in enumerate(self.moe_layers):
            if parsed is not None and isinstance(layer, MappedExperts):
                layer.use_slot_kernel()  # dropped experts need a map, even if all are resident
            layer.gating = None if parsed is None else gates.LayerGate(parsed, index)
        self._budget = None
        if parsed is not None and parsed.nats_per_token is not None:
            self._budget = LossBudget(parsed.threshold, parsed.nats_per_token)
        self._spent = 0.0

    def _leave_room(self, available: int) -> int:
        """Returns the bytes for the KV cache: `available`, plus those of slots given up for it."""
        room = room_for_kv_cache(self._config, self.vllm_config, self._loading, self.expert_cache, available)
        if room != available and self.device_only is not None and self.device_only.in_place is not None:
            self.device_only.in_place.follow_pools()
        return room

    def set_cache(self, settings: dict[str, Any], curves: list[list[float]] | None = None) -> None:
        """Restarts the cache with empty slots and other policies; its size stays.

        Args:
            settings: `adapmoe_config`; its budget and store have no effect.
            curves: expected loads of each layer by number of slots, for `allocation: profile`.
        """
        cache, config = self.expert_cache, AdapMoEConfig.parse(settings)
        assert cache is not None
        slots = [pool.num_slots for pool in cache.pools]
        setup = CacheSetup.of(config, slots, curves, self.heads is not None)
        cache.restart(CacheController(cache.controller.shape, setup), config.link_gbps)
        self._look_ahead(config)

    def compile_or_warm_up_model(self) -> Any:
        """Warms up and captures CUDA graphs, for which model runner V2 runs steps of dummy requests.

        Those load no experts and are not counted. A capture is global: no fetch may be in flight meanwhile.
        """
        self._warming_up = True
        try:
            with self._quiet():
                return super().compile_or_warm_up_model()
        finally:
            self._warming_up = False

    def _quiet(self) -> AbstractContextManager[None]:
        return nullcontext() if self.expert_cache is None else self.expert_cache.quiet()

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._warming_up:
            return super().execute_model(scheduler_output)
        self._scheduler_output = scheduler_output
        self._scheduled = scheduler_output.num_scheduled_tokens
        self._check_weights()
        if self.device_only is not None:
            self.device_only.drain_finished(self.predictor)
        if self._scheduled and self.predictor is not None:
            self.predictor.begin_step(self._scheduled)
        self._awaits_logits = bool(self._scheduled)
        self._clock.start()
        self._loading.in_step = True
        try:
            with self._step(scheduler_output.total_num_scheduled_tokens):
                output = super().execute_model(scheduler_output)
        finally:
            self._loading.in_step = False
        self._keep_budget()
        if self._scheduled:
            self._step_report = self._report_step(scheduler_output)
        return self._with_stats(output)

    def _check_weights(self) -> None:
        """Prevents output of tokens computed while weights are being replaced, or after that failed halfway.

        Raises:
            AdapMoEError: an update is in progress, or the weights are mixed and requests cannot be failed one by one.
        """
        if not self._scheduled:
            return
        if self._update is not None:
            raise AdapMoEError("a step was run while weights are replaced; pause generation before start_weight_update")
        if self.broken is None:
            return
        if not self._fails_requests:
            raise AdapMoEError(self.broken)
        for name in self._scheduled.keys() - self._failed:
            logger.error("Expert cache: request %s fails: %s", name, self.broken)
        self._failed |= self._scheduled.keys()

    def _step(self, tokens: int) -> AbstractContextManager[None]:
        if self.device_only is None or not tokens:
            return nullcontext()
        return self.device_only.step(tokens, self._requests_of_step)

    def _report_step(self, scheduler_output: Any) -> StepReport | None:
        """Returns the scheduler's report on the launched step and the times of finished ones; None if not needed."""
        experts = None if self.predictor is None else self.predictor.experts
        if experts is None or self.expert_cache is None:
            return None
        experts.forget(scheduler_output.finished_req_ids)
        experts.end()
        if not self._config.scheduler.enabled:
            return None
        stats = self.expert_cache.stats
        counted = [stats.stall_seconds, stats.demand_loads + stats.prefetches, stats.fetch_seconds]
        stall_seconds, loads, fetch_seconds = self._since(stats, counted).tolist()
        prefill = runs_prompt(self._scheduled, scheduler_output.scheduled_spec_decode_tokens)
        self._clock.stop((stall_seconds, int(loads), fetch_seconds, prefill))
        held = bits(self.expert_cache.controller.held)  # other ranks' experts take no slot here
        return StepReport(
            slots=self.expert_cache.num_slots,
            resident=bits(self.expert_cache.resident()),
            expected={name: its & held for name, its in experts.top_expected().items()},
            times=[StepTimes(seconds, *about) for seconds, about in self._clock.finished()],
        )

    def _keep_budget(self) -> None:
        """Adjusts every gate's threshold by the loss of a decode step, to keep the loss budget."""
        if self._budget is None:
            return
        layer_gates = [layer.gating for layer in self.moe_layers if layer.gating is not None]
        spent, self._spent = self._spent, sum(gate.stats.loss_spent for gate in layer_gates)
        tokens = len(self._scheduled)
        if tokens and max(self._scheduled.values()) == 1:  # prompts lose next to nothing, as they need every expert
            threshold = self._budget.spend(self._spent - spent, tokens)
            for gate in layer_gates:
                gate.threshold = threshold

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return output if self._warming_up else self._with_stats(output)

    def _fail_requests(self, failed_tokens: torch.Tensor, error: ExpertsUnavailable) -> None:
        """Marks the requests of failed rows, whose experts cannot be read, to be ended with this step.

        Args:
            failed_tokens: bool `[rows]`.
            error: the reason, for the log.
        """
        row = 0
        for name, _, rows in self._requests_of_step():
            if failed_tokens[row : row + rows].any() and name not in self._failed:
                logger.error("Expert cache: request %s fails: %s", name, error)
                self._failed.add(name)
            row += rows

    def _with_stats(self, output: Any) -> Any:
        return with_attributes(output, self._report)

    def _report(self) -> dict[str, Any]:
        """Returns what the scheduler gets with a step's tokens: counters, failed requests and `StepReport`."""
        report: dict[str, Any] = {"worker_stats": self.step_stats.step()}
        if self._failed:
            report["failed_requests"] = sorted(self._failed)
            self._failed.clear()
        if self._step_report is not None:
            report["expert_report"], self._step_report = self._step_report, None
        return report

    def expert_cache_stats(self) -> dict[str, float]:
        """Returns the `total_stats` of this rank."""
        if self.device_only is not None:
            self.device_only.drain_finished(self.predictor)
        return total_stats(self.expert_cache, self.moe_layers)

    def expert_bytes(self) -> int:
        """Returns the bytes of the largest expert."""
        assert self.expert_cache is not None
        return max(self.expert_cache.controller.expert_bytes)

    def kept_by_layer(self) -> list[float]:
        """Returns the mean number of experts kept per token in each layer since gating was set."""
        stats = [layer.gating.stats for layer in self.moe_layers if layer.gating is not None]
        return [one.kept_experts / max(one.gated_tokens, 1) for one in stats]

    def shutdown(self) -> None:
        if self.predictor is not None:
            self.predictor.close()
            self.predictor = None
        if self.expert_cache is not None:
            self.expert_cache.close()
            self.expert_cache = None
        super().shutdown()


class AdapMoEWorker(ExpertCacheWorker, Worker):
    """vLLM's GPU worker with an expert cache."""

    def determine_available_memory(self) -> int:
        """Returns the bytes for the KV cache, by vLLM's measurement of what the slot count only estimated."""
        with self._quiet():  # vLLM captures graphs to measure them
            available = super().determine_available_memory()
        return self._leave_room(available)


class AdapMoECPUWorker(ExpertCacheWorker, CPUWorker):
    """vLLM's CPU worker with an expert cache."""

    def init_device(self) -> None:
        super().init_device()
        # vLLM's attention uses AMX where the CPU has it (v1/attention/backends/cpu_attn.py) without requesting it from
        # the OS kernel. Unless a oneDNN product has done so before, the first request ends the process (SIGILL).
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()

    def determine_available_memory(self) -> int:
        """Returns the bytes for the KV cache. vLLM counts resident memory, which slots become only when filled."""
        available = super().determine_available_memory()
        if self.expert_cache is None or self.cache_config.kv_cache_memory_bytes is not None:
            return available
        available = self._leave_room(available - slot_bytes(self.expert_cache))
        logger.info("Expert cache: %.2f GiB of that for the KV cache, the rest for slots", available / GiB)
        return available
