"""vLLM's GPU and CPU workers, extended by an expert cache."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.collaborators import Collaborators, Probe
from vllm_adapmoe.integration.layers.gates import Gating
from vllm_adapmoe.integration.layers.mapped_experts import MappedExperts
from vllm_adapmoe.integration.loading.drafter import resident_drafter
from vllm_adapmoe.integration.loading.expert_loading import expert_loading
from vllm_adapmoe.integration.loading.kv_room import room_for_kv_cache
from vllm_adapmoe.integration.loading.slot_pools import slots_device
from vllm_adapmoe.integration.reported_output import ends_step, with_report
from vllm_adapmoe.integration.scheduler.scheduler import is_cache_aware
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.integration.worker.build_predictor import build_predictor
from vllm_adapmoe.integration.worker.compile_key import record_traced_layers
from vllm_adapmoe.integration.worker.current_step import CurrentStep
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor
from vllm_adapmoe.integration.worker.gpu_steps import GpuSteps
from vllm_adapmoe.integration.worker.step_clock import StepClock
from vllm_adapmoe.integration.worker.updated_worker import UpdatedWorker
from vllm_adapmoe.integration.worker.warm_up import warm_up_decisions
from vllm_adapmoe.integration.worker.worker_stats import CounterDelta, StepStats, total_stats
from vllm_adapmoe.prefetch.heads import NextTokenHeads
from vllm_adapmoe.scheduling.report import StepTimes, WorkerReport
from vllm_adapmoe.units import GiB

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker
else:
    CPUWorker = object

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def slot_bytes(cache: ExpertCacheManager) -> int:
    """Returns the bytes of all slots."""
    return sum(pool.nbytes for pool in cache.pools)


class ExpertCacheWorker(UpdatedWorker, Worker):
    """Mixin that builds the expert cache while the model loads, and reports its activity after every step."""

    expert_cache: ExpertCacheManager | None = None
    moe_layers: list[CachedExperts]
    current_step: CurrentStep
    gating: Gating | None = None
    predictor: ExpertPredictor | None = None
    probes: Sequence[Probe] = ()
    """Probe of each layer while the model is measured (`measure.worker_extension`); otherwise empty."""
    gpu_steps: GpuSteps | None = None
    """Steps and layers that run without the host; None on the CPU and with stock layers."""
    _step_times: Sequence[StepTimes] = ()
    """Times of finished steps, until they are sent with a step's output."""
    _warming_up = False
    """Whether vLLM is running warm-up steps."""

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model and allocates its slots, before vLLM measures the memory that remains for the KV cache."""
        settings = EngineSettings.of(self.vllm_config)
        config = self._config = settings.config
        self._since, self._clock = CounterDelta(), StepClock(slots_device())
        self._dummy_weights = self.vllm_config.load_config.load_format == "dummy"
        # Other ranks, or another scheduler, would not know of the failure and would continue the request.
        fails_requests = self.vllm_config.parallel_config.world_size == 1 and is_cache_aware(
            self.vllm_config.scheduler_config.scheduler_cls
        )
        self.current_step = CurrentStep(self.model_runner, fails_requests)
        with expert_loading(settings, self.vllm_config) as loading:
            count_drafter = loading.pools.count_drafter
            with resident_drafter(self.model_runner, self.vllm_config, loading.building.close, count_drafter):
                super().load_model(**kwargs)
            self.expert_cache = loading.finish(self.model_runner.get_model())
        self.moe_layers, self._loading = loading.layers, loading
        self.gpu_steps = GpuSteps.of(settings, self.vllm_config, self.moe_layers, self.expert_cache)
        self.heads = None
        if settings.heads is not None:
            self.heads = NextTokenHeads.load(Path(settings.heads.path), settings.heads.hash, *settings.heads.shape)
            self.heads.check([layer.hidden_size for layer in self.moe_layers], self.model_config.get_hidden_size())
        self.use_gating(settings.gating)
        self.restart_predictor(config)
        model = self.model_runner.get_model()
        record_traced_layers(self.vllm_config, model, self.moe_layers, self.gpu_steps is not None)
        self.runs_stock_layers = all(layer.is_stock for layer in self.moe_layers)
        """Whether vLLM's own layers were compiled, which cannot gate or fetch."""
        self._hook_compute_logits()
        self.guard_weights()
        group = get_tp_group()
        self.step_stats = StepStats(
            self.expert_cache, self.moe_layers, group.cpu_group if group.world_size > 1 else None
        )
        if self.expert_cache is not None:
            cache = self.expert_cache
            experts = sum(cache.controller.num_local)
            logger.info(
                "Expert cache: %d slots (%.2f GiB) for %d experts, backed by the %s store",
                cache.num_slots, slot_bytes(cache) / GiB, experts, loading.store_kind,
            )  # fmt: skip

    def bind_layers(self) -> None:
        """Sets the collaborators of every layer from the next step on."""
        gpu_steps = self.gpu_steps
        for index, layer in enumerate(self.moe_layers):
            layer.bind(
                Collaborators(
                    step=self.current_step,
                    gating=None if self.gating is None else self.gating.layers[index],
                    predictor=self.predictor,
                    probe=self.probes[index] if self.probes else None,
                    deferred=None if gpu_steps is None else gpu_steps.routing,
                    decode=None if gpu_steps is None else gpu_steps.decode,
                )
            )

    def use_gating(self, plan: GatingPlan | None) -> None:
        """Gates every layer by the plan from the next step on; None: no gating.

        Raises:
            AdapMoEError: the plan is for other layers.
        """
        if plan is not None and len(plan.sensitivity) != len(self.moe_layers):
            raise AdapMoEError(
                f"the gating plan is for {len(plan.sensitivity)} MoE layers, this worker has {len(self.moe_layers)}"
            )
        if plan is not None:
            for layer in self.moe_layers:
                if isinstance(layer, MappedExperts):
                    layer.use_slot_kernel()  # dropped experts need a map, even if all are resident
        self.gating = None if plan is None else Gating(plan)
        if self.gpu_steps is not None:
            self.gpu_steps.use_gating(self.gating)
        self.bind_layers()

    def restart_predictor(self, config: AdapMoEConfig) -> None:
        """Starts prediction, prefetch and trace recording as configured, replacing the previous predictor."""
        self._close_predictor()
        self.predictor = build_predictor(
            config,
            self.vllm_config,
            self.model_runner.get_model(),
            self.moe_layers,
            self.expert_cache,
            self.heads,
            self.current_step,
        )
        if self.predictor is not None:
            dtype: Any = self.model_config.dtype
            self.predictor.prepare(dtype, slots_device())
            if self.gpu_steps is not None and self.gpu_steps.decode is not None:
                self.predictor.trace_on_device(self.gpu_steps.routing.tokens, slots_device())
        self.bind_layers()

    def _close_predictor(self) -> None:
        """Closes the predictor, with a trace of all steps so far."""
        predictor, self.predictor = self.predictor, None
        if predictor is None:
            return
        try:
            if self.gpu_steps is not None and predictor.is_tracing:
                self.gpu_steps.drain(predictor)
        finally:
            predictor.close()

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

    def _bytes_for_kv_cache(self, available: int) -> int:
        """Returns the bytes for the KV cache: `available`, plus those of slots released for it."""
        self._give_back()
        room = room_for_kv_cache(self._config, self.vllm_config, self._loading, self.expert_cache, available)
        if room != available and self.gpu_steps is not None:
            self.gpu_steps.rebuild(self.vllm_config.compilation_config)
        return room

    def compile_or_warm_up_model(self) -> Any:
        """Warms up and captures CUDA graphs, for which model runner V2 runs steps of dummy requests.

        Dummy steps load no experts and are not counted. Capture is global, so no fetch may be in flight during it.
        """
        if self.expert_cache is not None:
            warm_up_decisions(self.expert_cache.controller.setup.eviction)
        self._warming_up = True
        try:
            with self._warm_up():
                return super().compile_or_warm_up_model()
        finally:
            self._warming_up = False

    def _warm_up(self) -> AbstractContextManager[None]:
        """Lets vLLM warm up and capture graphs: on the GPU's own cache if it decides, else without any transfer."""
        on_gpu = None if self.gpu_steps is None else self.gpu_steps.warm_up()
        if on_gpu is not None:
            return on_gpu
        return nullcontext() if self.expert_cache is None else self.expert_cache.quiet()

    def _give_back(self) -> None:
        """Hands the cache to the host, if the GPU has it."""
        if self.gpu_steps is not None:
            self.gpu_steps.give_back()

    def execute_dummy_batch(self) -> None:
        if self.gpu_steps is not None:
            self.gpu_steps.prepare_padding()
        super().execute_dummy_batch()

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._warming_up:
            return super().execute_model(scheduler_output)
        step, predictor = self.current_step, self.predictor
        step.begin(scheduler_output)
        self._check_weights()
        if self.gpu_steps is not None:
            self.gpu_steps.drain_finished(predictor)
            self.gpu_steps.prepare(step.tokens, predictor)
        if step.rows and predictor is not None:
            predictor.begin_step(step.rows)
        self._awaits_logits = bool(step.rows)
        self._clock.start()
        with step.launch(), self._device_step(scheduler_output.total_num_scheduled_tokens):
            output = super().execute_model(scheduler_output)
        if self.gating is not None and not self._gpu_decides():
            self.gating.end_step(sum(step.rows.values()), step.prompt_rows)
        if step.rows:
            self._step_times = self._report_step(scheduler_output)
        return self._with_report(output)

    def _check_weights(self) -> None:
        """Prevents output of tokens computed while weights are being replaced, or after that failed halfway.

        Raises:
            AdapMoEError: an update is in progress, or the weights are mixed and requests cannot be failed one by one.
        """
        if not self.current_step.rows:
            return
        if self._update is not None:
            raise AdapMoEError(
                "a step ran while weights were being replaced; pause generation before start_weight_update"
            )
        if self.broken is None:
            return
        if not self.current_step.fails_requests:
            raise AdapMoEError(self.broken)
        self.current_step.fail_all(self.broken)

    def _device_step(self, tokens: int) -> AbstractContextManager[None]:
        if self.gpu_steps is None or not tokens:
            return nullcontext()
        return self.gpu_steps.step(tokens, self.current_step, self.predictor)

    def _gpu_decides(self) -> bool:
        """Returns whether the GPU decides in the current step."""
        return self.gpu_steps is not None and self.gpu_steps.decides(self.current_step.tokens)

    def _report_step(self, scheduler_output: Any) -> Sequence[StepTimes]:
        """Returns the times of finished steps, for the scheduler; none if it does not need them."""
        experts = None if self.predictor is None else self.predictor.experts
        if experts is not None:
            experts.forget(scheduler_output.finished_req_ids)
            experts.end()
        if self.expert_cache is None or not self._config.scheduler.enabled:
            return ()
        stats = self.expert_cache.update_stats()
        by_device = self.expert_cache.controller.device_stall_seconds
        of_host, of_device = self._since(stats, [stats.stall_seconds - by_device, by_device]).tolist()
        # What the device counts comes one or two steps late: never with a step that the host decides.
        self._clock.stop((of_device if self._gpu_decides() else of_host, self.current_step.prompt_rows > 0))
        return [StepTimes(seconds, *inputs) for seconds, inputs in self._clock.finished()]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return output if self._warming_up else self._with_report(output)

    def _with_report(self, output: Any) -> Any:
        if not ends_step(output):
            return output
        times, self._step_times = self._step_times, ()
        return with_report(
            output, WorkerReport(self.step_stats.step(self.gating), self.current_step.take_failed(), times)
        )

    def expert_cache_stats(self) -> dict[str, float]:
        """Returns the `total_stats` of this rank."""
        if self.gpu_steps is not None:
            self.gpu_steps.drain_finished(self.predictor)
        return total_stats(self.expert_cache, self.moe_layers, self.gating)

    def shutdown(self) -> None:
        try:
            self._close_predictor()
        finally:
            if self.expert_cache is not None:
                self.expert_cache.close()
                self.expert_cache = None
            super().shutdown()


class AdapMoEWorker(ExpertCacheWorker, Worker):
    """vLLM's GPU worker with an expert cache."""

    def determine_available_memory(self) -> int:
        """Returns the bytes for the KV cache, by vLLM's measurement of what the slot count only estimated."""
        with self._warm_up():  # vLLM captures graphs to measure them
            available = super().determine_available_memory()
        return self._bytes_for_kv_cache(available)


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
        available = self._bytes_for_kv_cache(available - slot_bytes(self.expert_cache))
        logger.info("Expert cache: %.2f GiB of that for the KV cache, the remainder for slots", available / GiB)
        return available
