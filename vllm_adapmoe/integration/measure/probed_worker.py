"""What calibration and benchmarks ask of a worker: a probe in its layers, and where the time goes."""

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.loading.built_model import experts_built
from vllm_adapmoe.integration.measure.probe import RoutingProbe, plain
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor


class ProbedWorker(Worker):
    """Mixin over a worker whose MoE layers are cached."""

    moe_layers: list[CachedExperts]

    def experts_built(self) -> dict[str, int]:
        """`built_model.experts_built`."""
        return experts_built(self.moe_layers)

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

    def fit_heads(self, layers: list[int]) -> None:
        """`RoutingProbe.fit_heads`."""
        self.probe.fit_heads(layers)

    def read_heads(self) -> dict[str, list]:
        """`RoutingProbe.read_heads`, by layer as text."""
        return {str(index): weights.tolist() for index, weights in self.probe.read_heads().items()}

    def time_parts(self) -> None:
        """Adds up what the expert kernels, and what looking ahead, take, from here on."""
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
        """What `time_parts` has added up."""
        return dict(self.seconds)
