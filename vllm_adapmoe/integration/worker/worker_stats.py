"""Statistics of a worker's expert cache and gates: totals since the start, and increments per step for `/metrics`."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.layers.gates import GateStats, total
from vllm_adapmoe.policy.controller import CacheStats

Stats = dict[str, float | list[float]]
"""Statistics by name; lists have one entry per MoE layer."""

COUNTERS = (*(field.name for field in fields(CacheStats)), "demand_loads")
STALL = COUNTERS.index("stall_seconds")


def total_stats(cache: ExpertCacheManager | None, layers: Sequence[CachedExperts]) -> dict[str, float]:
    """Returns this rank's counters since the start, and the numbers of slots and of filled slots.

    Empty if every expert fits and nothing is gated.
    """
    gated = [layer.gating.stats for layer in layers if layer.gating is not None]
    if cache is None and not gated:
        return {}
    stats = CacheStats() if cache is None else cache.stats
    return vars(stats) | {"demand_loads": stats.demand_loads} | _slots(cache, layers) | total(gated)


def _slots(cache: ExpertCacheManager | None, layers: Sequence[CachedExperts]) -> dict[str, float]:
    if cache is not None:
        return {"slots": cache.num_slots, "resident": cache.num_resident}
    experts = sum(layer.local_num_experts for layer in layers)
    return {"slots": experts, "resident": experts}


class CounterDelta:
    """Computes increments of counters between calls; starts from zero when their owner is another object."""

    def __init__(self) -> None:
        self._owner: object = None
        self._before: np.ndarray | None = None

    def __call__(self, owner: object, now: list[float]) -> np.ndarray:
        counted = np.array(now, dtype=np.float64)
        change = counted - self._before if owner is self._owner and self._before is not None else counted
        self._owner, self._before = owner, counted
        return change


class StepStats:
    """Computes the increments of the counters per step.

    With several ranks, each holds and fetches its own shard of every expert: shards, slots, bytes and fetch time are
    summed over the ranks, while the waiting time is the maximum, as other ranks wait for the slowest. The numbers are
    gathered while the next step runs, and so reported with it.

    Args:
        cache: this rank's cache; None if every expert is resident.
        layers: the model's MoE layers.
        group: host process group of the ranks; None for a single rank.
    """

    def __init__(
        self, cache: ExpertCacheManager | None, layers: Sequence[CachedExperts], group: dist.ProcessGroup | None
    ) -> None:
        self.cache = cache
        self.layers = layers
        self.group = group
        self._fetched, self._gated = CounterDelta(), CounterDelta()
        self._gathered: tuple[Any, list[torch.Tensor]] | None = None

    def step(self) -> Stats | None:
        """Returns the increments since the last call, or None. Collective: all ranks must call it equally often."""
        stats: Stats = {}
        if self.cache is not None:
            mine = self._cache_numbers(self.cache)
            numbers = mine if self.group is None else self._of_all_ranks(mine, self.group)
            if numbers is not None:
                stats |= self._named(numbers)
        if self.layers and self.layers[0].gating is not None:
            stats |= self._gate_stats()
            if self.cache is None:
                stats |= _slots(None, self.layers)
        return stats or None

    def _cache_numbers(self, cache: ExpertCacheManager) -> np.ndarray:
        """Returns the numbers that `_named` names: increments of counters, then gauges."""
        controller, stats = cache.controller, cache.stats
        counted = [*vars(stats).values(), stats.demand_loads, *controller.layer_hits, *controller.layer_misses]
        of_layers = [*controller.layer_residents(), *controller.num_held, *controller.layer_floors()]
        is_now = [cache.num_slots, cache.num_resident, *of_layers]
        return np.concatenate((self._fetched(controller, counted), is_now))

    def _of_all_ranks(self, mine: np.ndarray, group: dist.ProcessGroup) -> np.ndarray | None:
        before, tensor = self._gathered, torch.from_numpy(mine)
        theirs = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        self._gathered = dist.all_gather(theirs, tensor, group=group, async_op=True), theirs
        if before is None:
            return None
        before[0].wait()
        numbers = torch.stack(before[1]).numpy()
        combined = numbers.sum(0)
        combined[STALL] = numbers[:, STALL].max()
        return combined

    def _named(self, numbers: np.ndarray) -> Stats:
        values, count = numbers.tolist(), len(self.layers)
        stats: Stats = dict(zip(COUNTERS, values, strict=False))
        values = values[len(COUNTERS) :]
        stats["layer_hits"], stats["layer_misses"] = values[:count], values[count : 2 * count]
        stats["slots"], stats["resident"] = values[2 * count : 2 * count + 2]
        values = values[2 * count + 2 :]
        stats["layer_resident"], stats["layer_experts"] = values[:count], values[count : 2 * count]
        if len(values) > 2 * count:
            stats["layer_floors"] = values[2 * count :]
        return stats

    def _gate_stats(self) -> Stats:
        """Returns the gates' increments on this rank alone, as all ranks gate the same tokens."""
        gates = [layer.gating for layer in self.layers]
        counted = [gate.stats if gate is not None else GateStats() for gate in gates]
        now = [one.gated_tokens for one in counted] + [one.kept_experts for one in counted]
        change = self._gated(gates[0], [*now, sum(one.loss_spent for one in counted)]).tolist()
        tokens, kept, loss = change[: len(gates)], change[len(gates) : -1], change[-1]
        return {
            "gated_tokens": sum(tokens),
            "kept_experts": sum(kept),
            "loss_spent": loss,
            "layer_gated_tokens": tokens,
            "layer_kept_experts": kept,
        }


def with_attributes(output: Any, attributes: Callable[[], dict[str, Any]]) -> Any:
    """Adds attributes to a step's output: immediately, or to an asynchronous output when it is awaited."""
    if isinstance(output, ModelRunnerOutput):
        if output is EMPTY_MODEL_RUNNER_OUTPUT:  # a shared object
            output = copy(output)
        vars(output).update(attributes())
        return output
    return WithAttributes(output, attributes()) if isinstance(output, AsyncModelRunnerOutput) else output


class WithAttributes(AsyncModelRunnerOutput):
    """An output in flight from the device, with attributes to add to it."""

    def __init__(self, output: AsyncModelRunnerOutput, attributes: dict[str, Any]) -> None:
        self.output = output
        self.attributes = attributes

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        vars(output).update(self.attributes)
        return output

    def get_kv_connector_output(self) -> Any:
        """Returns the part of the output that remains if `get_output` fails; vLLM calls this since 0.33."""
        output: Any = self.output
        return output.get_kv_connector_output()
