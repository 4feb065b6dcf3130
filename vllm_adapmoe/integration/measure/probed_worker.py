"""Worker methods for calibration and benchmarks: a probe in the layers, and timing of parts."""

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.loading.built_model import experts_built
from vllm_adapmoe.integration.measure.probe import RoutingProbe, plain
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor


class ProbedWorker(Worker):
    """Mixin that adds probes and timing to a worker with cached MoE layers."""

    moe_layers: list[CachedExperts]

    def experts_built(self) -> dict[str, int]:
        """Returns `built_model.experts_built` of the worker's layers."""
        return experts_built(self.moe_layers)

    def start_probe(self) -> None:
        """Starts to record the routing (`RoutingProbe`). Eager engines only."""
        runners = self.vllm_config.compilation_config.static_forward_context
        self.probe = RoutingProbe(self.moe_layers, self.model_runner.get_model(), runners)

    def probe_layer(self, recording: bool, disturbed: int | None = None, step: float = 0.0) -> None:
        """Configures the probe: whether to record, and which layer to move `step` of the way to half its experts."""
        self.probe.recording, self.probe.disturbed, self.probe.step = recording, disturbed, step

    def read_probe(self) -> list[dict[str, list]]:
        """Returns the sums of each layer since the last call."""
        return plain(self.probe.read())

    def fit_heads(self, layers: list[int]) -> None:
        """Starts to fit next-token heads (`RoutingProbe.fit_heads`)."""
        self.probe.fit_heads(layers)

    def read_heads(self) -> dict[str, list]:
        """Returns `RoutingProbe.read_heads` as lists, with layers as text."""
        return {str(index): weights.tolist() for index, weights in self.probe.read_heads().items()}

    def time_parts(self) -> None:
        """Starts to measure the time of expert kernels and of prediction."""
        self.seconds = dict.fromkeys(("kernels", "lookahead"), 0.0)

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = time.perf_counter()
                output = function(*args)
                self.seconds[part] += time.perf_counter() - start
                return output

            return run

        for layer in self.moe_layers:
            layer._run_kernel = timed("kernels", layer._run_kernel)  # type: ignore[method-assign]
        for name in ("predict", "_observe", "end_step"):
            setattr(ExpertPredictor, name, timed("lookahead", getattr(ExpertPredictor, name)))

    def part_seconds(self) -> dict[str, float]:
        """Returns the seconds that `time_parts` has measured, by part."""
        return dict(self.seconds)
