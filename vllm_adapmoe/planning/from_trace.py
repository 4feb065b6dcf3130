"""Estimates the cost of a token by number of slots from a replay of recorded routing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from tqdm import tqdm

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.gating.rules import gate_tokens
from vllm_adapmoe.planning.memory_plan import Estimate, ModelSize, Speed
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step, Steps, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.simulate.virtual_link import Machine


@dataclass
class TraceReplay:
    """A trace to be replayed with the server's defaults, for given record sizes and speeds."""

    info: TraceInfo
    steps: Steps
    model: ModelSize
    speed: Speed
    allocation: str
    curves: list[list[float]] | None

    @classmethod
    def load(
        cls, path: Path, model: ModelSize, speed: Speed, allocation: str, curves: list[list[float]] | None
    ) -> Self:
        """Reads a trace of the model.

        Args:
            path: file written by `trace_out`.
            model: sizes of the model; its record size replaces the recorded one.
            speed: speed of link and compute.
            allocation: as in `adapmoe_config`.
            curves: expected loads of each layer by slots, for allocation `profile`.

        Raises:
            AdapMoEError: not a trace, or one recorded with another model.
        """
        info, steps = read_trace(path)
        recorded = (len(info.num_experts), max(info.num_experts), info.top_k)
        expected = (model.num_layers, model.num_experts, model.top_k)
        if recorded != expected:
            raise AdapMoEError(
                f"--trace={str(path)!r} was recorded with another model ({info.model}): layers, experts and top_k are "
                f"{recorded}, this model's are {expected}; record one with trace_out"
            )
        info = replace(info, expert_bytes=[model.expert_bytes] * model.num_layers)
        return cls(info, steps, model, speed, allocation, curves)

    def estimates(
        self, slots: Sequence[int], sensitivity: Sequence[float] | None = None, threshold: float = 0.0
    ) -> list[Estimate]:
        """Returns means over all rows of the trace, prompts included, for each number of slots.

        Args:
            slots: numbers of slots, each replayed once.
            sensitivity: sensitivity of each layer; None: no gating beyond what was recorded.
            threshold: gating threshold, nats.
        """
        steps: Steps = self.steps
        name = "Replaying"
        if sensitivity is not None:
            steps = GatedSteps(steps, sensitivity, threshold)
            name += ", gated"
        expert_uses = tokens = 0
        heads = False
        for step in steps:
            expert_uses += _distinct(step)
            tokens += len(step.positions)
            heads = heads or bool(step.expected)
        compute = self.speed.compute_seconds(self.model, expert_uses / len(steps))
        machine = Machine(
            self.speed.link,
            compute / self.model.num_layers + self.speed.decide_seconds,
            host_records=self.speed.host_experts,
            disk_bandwidth=self.speed.disk,
        )
        config = {"allocation": self.allocation}
        if self.allocation == "profile":
            config["profile"] = "given"
        settings = AdapMoEConfig.parse(config)
        made = []
        for count in tqdm(slots, desc=name, unit="replay"):
            if count == self.model.experts:  # every expert resident: no cache to replay
                made.append(Estimate(expert_uses / tokens, 0.0, 0.0, tokens / (len(steps) * compute)))
                continue
            setup = CacheSetup.from_config(settings, slots_of_pools(self.info, count), self.curves, heads)
            result = replay(self.info, steps, setup, machine)
            made.append(
                Estimate(
                    result.stats["hits"] / result.tokens,
                    result.stats["misses"] / result.tokens,
                    result.stats["fetched_bytes"] / result.tokens,
                    result.tokens / result.seconds,
                )
            )
        return made


@dataclass
class GatedSteps:
    """Steps after adaptive gating by token; see `gated`."""

    steps: Steps
    sensitivity: Sequence[float]
    threshold: float

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return (gated(step, self.sensitivity, self.threshold) for step in self.steps)


def gated(step: Step, sensitivity: Sequence[float], threshold: float) -> Step:
    """Returns a step with adaptive gating by token applied; its predictions still include the dropped experts.

    Args:
        step: the recorded step; experts dropped when it was recorded remain dropped.
        sensitivity: sensitivity of each layer, nats per token.
        threshold: gating threshold, nats.
    """
    weights = torch.from_numpy(step.weights.astype(np.float32))
    kept = [
        gate_tokens(layer_weights, value, threshold).weights
        for layer_weights, value in zip(weights, sensitivity, strict=True)
    ]
    return replace(step, weights=torch.stack(kept).numpy().astype(np.float16))


def _distinct(step: Step) -> int:
    """Counts the experts that a step needs over all layers; each counts once, however many tokens use it."""
    return sum(len(np.unique(ids[weights > 0])) for ids, weights in zip(step.ids, step.weights, strict=True))
