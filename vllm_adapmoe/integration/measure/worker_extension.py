"""MeasuredWorker: worker methods for calibration, evaluation and benchmarks, as vLLM's `worker_extension_cls`."""

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from vllm.config import ModelConfig, VllmConfig

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.collaborators import Probe
from vllm_adapmoe.integration.layers.gates import Gating
from vllm_adapmoe.integration.loading.built_model import experts_built
from vllm_adapmoe.integration.measure.host_path import HostPath
from vllm_adapmoe.integration.measure.probe import RoutingProbe, plain
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor
from vllm_adapmoe.integration.worker.gpu_steps import GpuSteps
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.prefetch.heads import NextTokenHeads


class MeasuredWorker:
    """Methods for `collective_rpc` that vLLM adds to a worker with cached layers (`WorkerWrapperBase.init_worker`).

    vLLM refuses an extension that has an attribute of the worker, so the worker's own are only declared.
    """

    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: Any
    expert_cache: ExpertCacheManager | None
    moe_layers: list[CachedExperts]
    gating: Gating | None
    heads: NextTokenHeads | None
    predictor: ExpertPredictor | None
    probes: Sequence[Probe]
    gpu_steps: GpuSteps | None
    runs_stock_layers: bool
    bind_layers: Callable[[], None]
    use_gating: Callable[[GatingPlan | None], None]
    restart_predictor: Callable[[AdapMoEConfig], None]

    def set_gating(self, plan: dict[str, Any] | None) -> None:
        """Gates every layer by the plan (`GatingPlan`, as a dict) from the next step on; None: no gating.

        Entries of the prefix cache stay as they were computed.

        Raises:
            AdapMoEError: the model was compiled or captured without gating, or the plan is for other layers.
        """
        if plan is not None and self.runs_stock_layers and not self.model_config.enforce_eager:
            raise AdapMoEError(
                "gating is not in the compiled model, because the engine started without it and with all experts "
                "resident; start it with gating, or with enforce_eager=True"
            )
        self._check_not_captured("gating")
        self.use_gating(None if plan is None else GatingPlan(**plan))

    def set_cache(self, settings: dict[str, Any], curves: list[list[float]] | None = None) -> None:
        """Restarts the cache with empty slots and other policies; its size stays.

        Args:
            settings: `adapmoe_config`; its budget and store have no effect.
            curves: expected loads of each layer by number of slots, for `allocation: profile`.
        """
        cache, config = self.expert_cache, AdapMoEConfig.parse(settings)
        assert cache is not None
        self._check_not_captured("the eviction policy")
        if self.gpu_steps is not None:
            self.gpu_steps.give_back()
        slots = [pool.num_slots for pool in cache.pools]
        setup = CacheSetup.from_config(config, slots, curves, self.heads is not None)
        cache.restart(CacheController(cache.controller.shape, setup), config.link_gbps)
        if self.gpu_steps is not None and self.gpu_steps.decode is not None:
            self.gpu_steps.decode.rebuild()
        self.restart_predictor(config)

    def _check_not_captured(self, what: str) -> None:
        """Refuses to change what CUDA graphs of whole steps contain.

        Raises:
            AdapMoEError: there are such graphs.
        """
        decides = self.gpu_steps is not None and self.gpu_steps.decode is not None
        if decides and self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            raise AdapMoEError(f"{what} is part of the CUDA graphs that decode=device has captured; set decode=host")

    def largest_expert_bytes(self) -> int:
        """Returns the bytes of the largest expert."""
        assert self.expert_cache is not None
        return max(self.expert_cache.controller.expert_bytes)

    def kept_by_layer(self) -> list[float]:
        """Returns the mean number of experts kept per token in each layer since gating was set."""
        stats = [] if self.gating is None else [gate.stats for gate in self.gating.layers]
        return [layer.kept_experts / max(layer.gated_tokens, 1) for layer in stats]

    def experts_built(self) -> dict[str, int]:
        """Returns `built_model.experts_built` of the worker's layers."""
        return experts_built(self.moe_layers)

    def start_probe(self) -> None:
        """Starts to record the routing (`RoutingProbe`). Eager engines only."""
        runners = self.vllm_config.compilation_config.static_forward_context
        self.routing_probe = RoutingProbe(self.moe_layers, self.model_runner.get_model(), runners)
        self.probes = self.routing_probe.of_layers
        self.bind_layers()

    def probe_layer(self, recording: bool, perturbed: int | None = None, step: float = 0.0) -> None:
        """Configures the probe: whether to record, and which layer to move `step` of the way to half its experts."""
        probe = self.routing_probe
        probe.recording, probe.perturbed, probe.step = recording, perturbed, step

    def read_probe(self) -> list[dict[str, list]]:
        """Returns the sums of each layer since the last call."""
        return plain(self.routing_probe.read())

    def fit_heads(self, layers: list[int]) -> None:
        """Starts to fit next-token heads (`RoutingProbe.fit_heads`)."""
        self.routing_probe.fit_heads(layers)

    def read_heads(self) -> dict[str, list]:
        """Returns `RoutingProbe.read_heads` as lists, with layers as text."""
        return {str(index): weights.tolist() for index, weights in self.routing_probe.read_heads().items()}

    def time_parts(self) -> None:
        """Starts to measure the time of expert kernels and of prediction, in this worker's own objects."""
        self.seconds = dict.fromkeys(("kernels", "lookahead"), 0.0)

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def run(*args: Any) -> Any:
                start = time.perf_counter()
                output = function(*args)
                self.seconds[part] += time.perf_counter() - start
                return output

            return run

        def time_predictor() -> None:
            predictor: Any = self.predictor
            if predictor is not None:
                for name in ("predict", "_prefetch", "end_step"):
                    setattr(predictor, name, timed("lookahead", getattr(predictor, name)))

        restart = self.restart_predictor

        def restart_timed(config: AdapMoEConfig) -> None:
            restart(config)
            time_predictor()

        for layer in self.moe_layers:
            kernel: Any = layer
            kernel._run_kernel = timed("kernels", layer._run_kernel)
        self.restart_predictor = restart_timed
        time_predictor()

    def part_seconds(self) -> dict[str, float]:
        """Returns the seconds that `time_parts` has measured, by part."""
        return dict(self.seconds)

    def start_host_path(self, clock: str, by_part: bool) -> str | None:
        """Starts to measure decode steps (`HostPath.start`), replacing a measurement in progress. Eager engines only.

        Returns:
            Why the clock does not exist on this machine; None: it does.
        """
        if not hasattr(self, "host_path"):
            self.host_path = HostPath(self)
        try:
            self.host_path.start(clock, by_part)
        except OSError as error:
            return str(error)
        return None

    def stop_host_path(self) -> tuple[int, list[tuple[int, dict[str, float]]]]:
        """Returns the number of MoE layers, and `HostPath.steps` since the start."""
        return self.host_path.layers, self.host_path.stop()
