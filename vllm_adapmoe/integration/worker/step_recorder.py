"""StepRecorder: collects the routing and predictions of one step after the other for a trace."""

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_adapmoe.integration.worker.current_step import Requests
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.simulate.trace import Step, TraceWriter


class StepRecorder:
    """Records steps layer by layer into a trace.

    Args:
        trace: receives every completed step.
        layers: number of MoE layers.
        top_k: most experts per token of any layer.
    """

    def __init__(self, trace: TraceWriter, layers: int, top_k: int) -> None:
        self.trace = trace
        self.layers = layers
        self.top_k = top_k
        self._step: Step | None = None
        """Step being recorded, or not yet written to the trace."""
        self._complete = False
        """Whether all layers of the step are recorded."""

    def begin(
        self,
        requests: Requests,
        tokens: int,
        predicted_before: np.ndarray | None,
        drafts: Mapping[str, Sequence[int]],
        seconds: float,
    ) -> None:
        """Writes the step before to the trace, and begins another one.

        Args:
            requests: id, first position and number of rows of each request.
            tokens: number of rows, without padding.
            predicted_before: experts expected for the step before it began, as in `Step.begin`; None: not predicted.
            drafts: draft tokens of each request that has some.
            seconds: time of its start, by a monotonic clock.
        """
        self.end()
        verified = [len(drafts.get(name, ())) for name, _, _ in requests]
        self._complete = False
        self._step = Step(
            seconds=seconds,
            requests=[name for name, _, rows in requests for _ in range(rows)],
            positions=np.concatenate([np.arange(start, start + rows) for _, start, rows in requests]),
            ids=np.zeros((self.layers, tokens, self.top_k), dtype=np.int64),
            weights=np.zeros((self.layers, tokens, self.top_k), dtype=np.float16),
            predicted={},
            begin=predicted_before,
            drafted=np.concatenate(
                [np.arange(rows) >= rows - count for (_, _, rows), count in zip(requests, verified, strict=True)]
            )
            if any(verified)
            else None,
        )

    def record(
        self, index: int, weights: np.ndarray, ids: np.ndarray, keep_mask: np.ndarray, expected: np.ndarray | None
    ) -> None:
        """Records one layer of the step.

        Args:
            index: MoE layer index.
            weights: router weights `[tokens, top_k]`, after gating.
            ids: chosen experts `[tokens, top_k]`.
            keep_mask: experts that gating keeps, bool `[tokens, top_k]`.
            expected: `LayerPrediction.expected` of the layer.
        """
        step = self._step
        if step is None or len(step.positions) != len(ids):
            return
        chosen = ids.shape[1]  # if fewer than in other layers, the rest counts as dropped
        step.ids[index, :, :chosen] = ids
        # A weight of zero means dropped, so kept weights are at least 1e-6.
        step.weights[index, :, :chosen] = np.where(keep_mask, np.maximum(weights, 1e-6), 0)
        if expected is not None:
            step.expected[index] = expected
        self._complete = index == self.layers - 1

    def add_predictions(self, index: int, by_distance: Mapping[int, PredictedExperts | None]) -> None:
        """Records the predictions made at a layer, by number of layers ahead; layer -1: at the end of the step."""
        if self._step is not None:
            self._step.predicted |= {
                (index, distance): predicted for distance, predicted in by_distance.items() if predicted is not None
            }

    def end(self) -> None:
        """Writes the step to the trace, if all of its layers are recorded."""
        if self._step is not None and self._complete:
            self.trace.add(self._step)
        self._step = None

    def give_up(self) -> None:
        """Closes the trace without the step in progress; readers skip an incomplete last frame."""
        self._step = None
        self.trace.file.close()

    def close(self) -> None:
        """Completes and closes the trace."""
        self.end()
        self.trace.close()
