"""DeviceSteps: replays the steps of a trace that a GPU decides, as `device.decode` runs them."""

import numpy as np

from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.simulate.trace import Step
from vllm_adapmoe.simulate.virtual_link import VirtualLink


class DeviceSteps:
    """Steps that a GPU decides: it loads what is missing at once, and prefetches for the next layer alone.

    Args:
        controller: decides; it is the host's between these steps.
        link: link of the host's steps; the GPU moves experts at its speed, without tiles.
        max_tokens: maximum tokens of a step that the GPU decides; 0: the host decides in every step.
    """

    def __init__(self, controller: CacheController, link: VirtualLink, max_tokens: int) -> None:
        self.controller = controller
        self.link = link
        self.max_tokens = max_tokens
        self.owns = False
        """Whether the GPU has the cache."""
        self.predicted = 0
        """As in `Replay.predicted_loads`."""

    def decides(self, step: Step) -> bool:
        """Returns whether the GPU decides in a step, as the worker does: by its number of tokens."""
        return len(step.positions) <= self.max_tokens

    def give_back(self) -> None:
        """Hands the cache to the host, unless it has it already."""
        if self.owns:
            self.controller.take_back()
            self.owns = False

    def run(self, step: Step, time: float) -> float:
        """Replays a step that begins at `time`; returns when its last layer ends."""
        if not self.owns:
            time = self._await(time, self.link.drain(time))
            self.controller.lend()
            self.owns = True
        copied = time
        for layer in range(len(step.ids)):
            ids = step.ids[layer]
            experts = np.flatnonzero(np.bincount(ids[step.weights[layer] > 0], minlength=1))
            votes = self._votes(step, layer)
            time = self._await(time, copied)  # the claim waits for prefetches
            demand, ahead = self.controller.decide_on_device(layer, experts, step.expected.get(layer), votes)
            before = self._votes(step, layer - 1) if layer else None
            if before is not None:
                self.predicted += sum(before[load.key[1]] > 0 for load in demand)
            time = self._await(time, time + self._seconds(layer, len(demand)))
            copied = time + self._seconds(layer + 1, len(ahead))
            time += self.link.machine.layer_seconds
        return time

    def _votes(self, step: Step, layer: int) -> np.ndarray | None:
        """Returns the tokens that are predicted to use each expert of the next layer; None: it is not predicted."""
        predicted = step.predicted.get((layer, 1))
        if predicted is None or self.controller.planner is None:
            return None
        return np.bincount(predicted.ids.ravel(), minlength=self.controller.shape.num_experts[layer + 1])

    def _seconds(self, layer: int, loads: int) -> float:
        """Returns the time of copies that one kernel makes at once."""
        machine = self.link.machine
        if not loads or machine.bandwidth is None:
            return 0.0
        seconds = machine.latency + loads * self.controller.expert_bytes[layer] / machine.bandwidth
        self.controller.stats.fetch_seconds += seconds
        return seconds

    def _await(self, time: float, end: float) -> float:
        self.controller.stats.stall_seconds += max(0.0, end - time)
        return max(time, end)
