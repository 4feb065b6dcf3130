"""vLLM's workers, with an expert cache."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.cache.budget import GiB
from vllm_adapmoe.cache.manager import CacheStats, ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.gating_plan import GatingPlan
from vllm_adapmoe.integration import gates
from vllm_adapmoe.integration.compat import adapmoe_settings, gating_settings
from vllm_adapmoe.integration.layers import CachedExperts
from vllm_adapmoe.integration.loading import expert_loading
from vllm_adapmoe.integration.probe import RoutingProbe, plain

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker
else:
    CPUWorker = object

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


class ExpertCacheWorker(Worker):
    """Mixin: builds the cache while the model loads, and reports what it did with every step."""

    expert_cache: ExpertCacheManager | None = None
    moe_layers: list[CachedExperts]

    def load_model(self, **kwargs: Any) -> None:
        config = AdapMoEConfig.parse(adapmoe_settings(self.vllm_config))
        with expert_loading(config, self.vllm_config) as loading:
            super().load_model(**kwargs)
            self.expert_cache = loading.finish()
        self.moe_layers = loading.layers
        self.set_gating(gating_settings(self.vllm_config))
        if self.expert_cache is not None:
            cache = self.expert_cache
            slot_bytes = sum(pool.num_slots * pool.layout.nbytes for pool in cache.pools)
            experts = sum(cache.store.num_experts(layer) for layer in range(cache.store.num_layers))
            logger.info(
                "Expert cache: %d slots (%.2f GiB) for %d experts, backed by the %s store",
                cache.num_slots, slot_bytes / GiB, experts, loading.store_kind,
            )  # fmt: skip

    def set_gating(self, plan: dict[str, Any] | None) -> None:
        """Gates every layer by the plan (`GatingPlan`, as a dict) from the next step on; None: as vLLM's router says.

        With every expert resident and `torch.compile`, only an engine that started with gating can change it. What
        the prefix cache holds stays as it was computed.
        """
        parsed = None if plan is None else GatingPlan(**plan)
        if parsed is not None and len(parsed.sensitivity) != len(self.moe_layers):
            raise AdapMoEError(
                f"the gating plan is for {len(parsed.sensitivity)} MoE layers, this worker has {len(self.moe_layers)}"
            )
        for index, layer in enumerate(self.moe_layers):
            layer.gate = None if parsed is None else gates.LayerGate(parsed, index)

    def start_probe(self) -> None:
        """Records the routing from here on (`RoutingProbe`). Eager engines only."""
        runners = self.vllm_config.compilation_config.static_forward_context
        self.probe = RoutingProbe(self.moe_layers, self.model_runner.get_model(), runners)

    def probe_layer(self, recording: bool, disturbed: int | None = None, step: float = 0.0) -> None:
        """What the probe does from here on: record every layer; in one, go `step` of the way to half its experts."""
        self.probe.recording, self.probe.disturbed, self.probe.step = recording, disturbed, step

    def read_probe(self) -> list[dict[str, list]]:
        """Sums of each layer since the last reading."""
        return plain(self.probe.read())

    def time_kernels(self) -> None:
        """Adds up what the expert kernels take, from here on."""
        self.seconds = 0.0

        def timed(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def run(*args: Any) -> torch.Tensor:
                start = time.perf_counter()
                output = kernel(*args)
                self.seconds += time.perf_counter() - start
                return output

            return run

        for layer in self.moe_layers:
            layer._run_kernel = timed(layer._run_kernel)  # type: ignore[method-assign]

    def kernel_seconds(self) -> float:
        """What `time_kernels` has added up."""
        return self.seconds

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._with_stats(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._with_stats(super().sample_tokens(grammar_output))

    def _with_stats(self, output: Any) -> Any:
        if isinstance(output, ModelRunnerOutput):
            output.worker_stats = self.expert_cache_stats()  # type: ignore[attr-defined]
        return output

    def expert_cache_stats(self) -> dict[str, float]:
        """Counters since the start, and how many slots there are and are filled.

        Empty where every expert fits and nothing is gated.
        """
        cache = self.expert_cache
        gated = [layer.gate.stats for layer in self.moe_layers if layer.gate is not None]
        if cache is None and not gated:
            return {}
        experts = sum(layer.local_num_experts for layer in self.moe_layers)
        slots = {"slots": experts, "resident": experts}
        if cache is not None:
            slots = {"slots": cache.num_slots, "resident": cache.num_resident}
        return vars(CacheStats() if cache is None else cache.stats) | slots | gates.total(gated)

    def kept_by_layer(self) -> list[float]:
        """Mean experts kept per token in each layer since gating was set."""
        stats = [layer.gate.stats for layer in self.moe_layers if layer.gate is not None]
        return [one.kept_experts / max(one.gated_tokens, 1) for one in stats]

    def shutdown(self) -> None:
        if self.expert_cache is not None:
            self.expert_cache.close()
            self.expert_cache = None
        super().shutdown()


class AdapMoEWorker(ExpertCacheWorker, Worker):
    """Worker of a GPU."""


class AdapMoECPUWorker(ExpertCacheWorker, CPUWorker):
    """Worker of the CPU."""
