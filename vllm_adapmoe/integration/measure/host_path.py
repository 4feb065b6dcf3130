"""HostPath: what the main thread of a worker does in decode steps, by part, beside vLLM's own MoE layers."""

from typing import Any

from vllm_adapmoe.integration.measure.part_timer import PartTimer
from vllm_adapmoe.integration.measure.thread_clock import open_clock

KERNEL, MOVE, VLLM = "kernel", "move", "vLLM"
"""Parts of a layer that are no host path: the expert kernel, bytes moved by the main thread, and what a layer of stock
vLLM does, too."""
LAYER_PARTS = (
    ("runner", "forward", VLLM),
    ("layer", "forward_modular", "dispatch"),
    ("layer", "run_experts", "rest"),
    ("layer", "_read_step", "read"),
    ("layer", "_predict", "predict"),
    ("cache", "begin", "begin"),
    ("predictor", "_prefetch", "prefetch"),
    ("cache", "arrivals", "wait"),
    ("transfers", "run", MOVE),
    ("method", "apply", KERNEL),
    ("cache", "release", "release"),
)
"""Owner, method and part of what a MoE layer calls in a step."""
WHOLE = (VLLM, "dispatch", MOVE, KERNEL)
"""Parts of a measurement of the host path as a whole, which then is "dispatch": each part that is timed costs more than
the timer can subtract, because the caches are cold in a step."""
STEP_PARTS = (
    ("predictor", "begin_step", "begin step"),
    ("predictor", "end_step", "end step"),
    ("worker", "_report_step", "report"),
    ("worker", "_with_report", "send report"),
)
"""Owner, method and part of what a worker calls once a step."""


class HostPath:
    """Measures a worker's decode steps, in its own objects.

    Args:
        worker: vLLM's worker, or ours, with its model loaded, not compiled.
    """

    def __init__(self, worker: Any) -> None:
        self.timer = PartTimer()
        self.steps: list[tuple[int, dict[str, float]]] = []
        """Requests and cost of each part, of every decode step since `start`."""
        self._requests = 0
        """Requests of the current step; 0: it is not measured."""
        runners = [
            runner
            for runner in worker.vllm_config.compilation_config.static_forward_context.values()
            if hasattr(runner, "routed_experts")
        ]
        self.layers = len(runners)
        cache, predictor = getattr(worker, "expert_cache", None), getattr(worker, "predictor", None)
        owners: dict[str, list[Any]] = {
            "runner": runners,
            "method": [runner.routed_experts.quant_method for runner in runners],
            "layer": getattr(worker, "moe_layers", []),
            "cache": [] if cache is None else [cache],
            "transfers": [] if cache is None else [cache.transfers],
            "predictor": [] if predictor is None else [predictor],
            "worker": [worker] if hasattr(worker, "moe_layers") else [],
        }
        for owner, method, part in (*LAYER_PARTS, *STEP_PARTS):
            for each in owners[owner]:
                setattr(each, method, self.timer.timed(part, getattr(each, method)))
        self._execute_model = worker.execute_model
        worker.execute_model = self._run_step

    def start(self, clock: str, by_part: bool) -> None:
        """Starts to measure decode steps by a clock of `open_clock`, by part or the host path as a whole (`WHOLE`).

        Raises:
            OSError: the machine does not have the clock.
        """
        self.steps, self._requests = [], 0
        self.timer.start(open_clock(clock), [part for _, _, part in (*LAYER_PARTS, *STEP_PARTS)] if by_part else WHOLE)

    def stop(self) -> list[tuple[int, dict[str, float]]]:
        """Stops measuring; returns `steps`."""
        self._end_step()
        self.timer.stop()
        return self.steps

    def _run_step(self, scheduler_output: Any) -> Any:
        self._end_step()  # the one before, with the tokens sampled after it
        rows = scheduler_output.num_scheduled_tokens
        self._requests = len(rows) if rows and max(rows.values()) == 1 else 0
        return self._execute_model(scheduler_output)

    def _end_step(self) -> None:
        parts = self.timer.take()
        if self._requests:
            self.steps.append((self._requests, parts))
        self._requests = 0
