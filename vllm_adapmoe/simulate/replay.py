"""Replays a routing trace against a cache, with the worker's own policy code on a virtual link and clock."""

import heapq
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import waves
from vllm_adapmoe.policy.eviction import EvictionPolicy
from vllm_adapmoe.policy.gpu_state import fitting_tokens
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.policy.prefetch_planner import PredictExperts
from vllm_adapmoe.simulate.device_steps import DeviceSteps
from vllm_adapmoe.simulate.trace import Step, Steps, TraceInfo
from vllm_adapmoe.simulate.virtual_link import Machine, VirtualLink


@dataclass
class Replay:
    """Result of a replay."""

    stats: dict[str, float]
    demand_loads: int
    tokens: int
    seconds: float
    step_seconds: list[float]
    predicted_loads: int
    """Demand loads that an earlier layer had predicted but that were not prefetched, because the link was busy or they
    ranked too low."""


def replay(
    info: TraceInfo,
    steps: Steps,
    setup: CacheSetup,
    machine: Machine | None = None,
    eviction: Callable[[int, int], EvictionPolicy] | None = None,
    tier: type[HostTier] = HostTier,
    device_tokens: int = 0,
) -> Replay:
    """Replays every step, layer by layer; all experts that a layer keeps in a step are requested at once.

    `tokens` counts the rows of every step, prompts included. A GPU decides in steps of at most `device_tokens` tokens
    whose experts are certain to fit the slots, and the host in the others.
    """
    machine = machine or Machine()
    controller = CacheController(info.shape, setup, eviction)
    link = VirtualLink(controller, machine, tier)
    slots = [setup.slots[pool] for pool in info.pool_of]
    device = DeviceSteps(controller, link, fitting_tokens(info.num_experts, slots, info.top_k, device_tokens))
    before: Step | None = None
    time = 0.0
    predicted = tokens = 0
    ends = [0.0]
    for step in steps:
        tokens += len(step.positions)
        if device.decides(step):
            time = device.run(step, time) + machine.step_seconds
            ends.append(time)
            before = step
            continue
        if before is not None:
            device.give_back()
            if controller.planner is not None and (-1, 1) in before.predicted:
                link.speculate(controller.prefetch(-1, None, _predict_experts(before, -1)))
            before = None
        link.speculate(
            controller.prefetch_first_layers(step.prompt_tokens, () if step.begin is None else list(step.begin))
        )
        for layer in range(len(info.num_experts)):
            ids, keep_mask = step.ids[layer], step.weights[layer] > 0
            experts = np.flatnonzero(np.bincount(ids[keep_mask], minlength=1))
            groups = waves(experts, controller.residency(layer).capacity)
            for wave, group in enumerate(groups):
                link.run(time)
                expected = step.expected.get(layer) if wave == 0 else None
                request = controller.begin(layer, group, experts if len(groups) > 1 else (), expected)
                link.submit(request)
                if wave == 0 and controller.planner is not None:
                    link.speculate(controller.prefetch(layer, (ids, keep_mask), _predict_experts(step, layer)))
                if controller.planner is not None and request.loads:
                    experts_predicted = _predicted_experts(step, layer, setup.lookahead)
                    predicted += sum(load.key[1] in experts_predicted for load in request.loads)
                waiting = [load.key for load in (*request.loads, *request.awaited)]
                if waiting and machine.bandwidth is not None:
                    link.now = max(link.now, time)
                    link.run(time, waiting)
                    controller.stats.stall_seconds += max(0.0, link.now - time)
                    time = max(time, link.now)
                controller.release(layer, group)
            time += machine.layer_seconds
        if controller.planner is not None and (-1, 1) in step.predicted:  # prediction for the next step's first layer
            link.run(time)
            link.speculate(controller.prefetch(-1, None, _predict_experts(step, -1)))
        time += machine.step_seconds
        link.run(time)
        ends.append(time)
    stats = controller.stats
    return Replay(
        asdict(stats),
        stats.demand_loads,
        tokens,
        time,
        np.diff(ends).tolist(),
        predicted + device.predicted,
    )


def _predicted_experts(step: Step, layer: int, lookahead: int) -> set[int]:
    """Returns the experts that earlier layers of the step predicted for this layer."""
    predictions = (step.predicted.get((layer - distance, distance)) for distance in range(1, lookahead + 1))
    return {
        expert
        for prediction in predictions
        if prediction is not None
        for expert in prediction.ids[prediction.keep_mask].tolist()
    }


def _predict_experts(step: Step, layer: int) -> PredictExperts:
    return lambda distance: step.predicted.get((layer, distance))


def belady(info: TraceInfo, steps: Iterable[Step], slots: Sequence[int], atomic: bool = True) -> np.ndarray:
    """Counts the loads of the optimal (Belady) cache, which knows future accesses but does not prefetch.

    Args:
        info: description of the trace.
        steps: steps of the trace.
        slots: slots of each pool.
        atomic: all experts of an event must be resident together. If False, they may come one after another, which
            gives a lower bound for any cache with that many slots.

    Returns:
        Loads per layer, int64 `[layers]`.
    """
    layers = len(info.num_experts)
    uses, ends = array("H"), array("q", [0])  # flat arrays, since a trace may be long
    for step in steps:
        for ids, weights in zip(step.ids, step.weights, strict=True):
            uses.extend(np.flatnonzero(np.bincount(ids[weights > 0], minlength=1)).tolist())
            ends.append(len(uses))
    never = len(ends) - 1
    following = np.full(len(uses), never)
    """For each use, the next event that uses the same expert."""
    later: dict[ExpertKey, int] = {}
    for event in range(never - 1, -1, -1):
        for use in range(ends[event], ends[event + 1]):
            key = event % layers, uses[use]
            following[use] = later.get(key, never)
            later[key] = event
    resident: list[dict[ExpertKey, int]] = [{} for _ in slots]
    heaps: list[list[tuple[int, ExpertKey]]] = [[] for _ in slots]
    loads = np.zeros(layers, dtype=np.int64)
    for event in range(never):
        layer = event % layers
        pool = info.pool_of[layer]
        pool_residents, heap = resident[pool], heaps[pool]
        experts = uses[ends[event] : ends[event + 1]].tolist()
        next_use = dict(zip(experts, following[ends[event] : ends[event + 1]].tolist(), strict=True))
        groups = waves(experts, slots[pool]) if atomic else [[expert] for expert in experts]
        for group in groups:
            new_entries = []
            for expert in group:
                key = layer, expert
                if key not in pool_residents:
                    loads[layer] += 1
                pool_residents[key] = next_use[expert]
                new_entries.append((-next_use[expert], key))
            while len(pool_residents) > slots[pool]:
                use, key = heapq.heappop(heap)
                if pool_residents.get(key) == -use:  # else an outdated entry of an earlier use
                    del pool_residents[key]
            for entry in new_entries:
                heapq.heappush(heap, entry)
    return loads
