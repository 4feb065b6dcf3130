"""Plans prefetches: which experts of later layers to load, and in which order."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.compiled import compiled
from vllm_adapmoe.policy.prediction import Precision, PredictedExperts, write_chances

RequestPrefetch = Callable[[ExpertKey, bool], bool]
"""Requests a prefetch of an expert; the flag says whether its use is near-certain. Returns True if it was queued."""
PredictExperts = Callable[[int], PredictedExperts | None]
"""Predicts the experts of the layer at a distance, the number of layers ahead; None: no prediction."""


class Residents(Protocol):
    """What a planner asks about the cache."""

    def slots_of(self, layer: int) -> np.ndarray:
        """Returns the slots of a layer's experts, int32 `[experts or more]`, -1 for those not resident."""

    def is_complete(self, layer: int) -> bool:
        """Returns whether all experts of a layer are resident or loading on demand, so that none can be prefetched."""


MIN_CHANCE = 0.5
"""Minimum chance of use of a prefetched expert: below it a prefetch is more likely wasted than used."""
CERTAIN_PROB = 0.9
"""Chance from which a prefetch is near-certain: it is exempt from `max_experts`, and may evict resident experts."""
PREDICTION_BYTES = 1e6
"""Bytes of experts that a CPU reads, at 10 GB/s, while the main thread makes a prediction: 0.1 ms
(examples/benchmarks/host_path.json)."""
MAX_MIN_MISSING = 0.1
"""Maximum of `min_missing`, for layers that compute in no more than a millisecond."""
MISSING_EVENTS = 16.0
"""Events of a layer after which the weight of an older one in that mean has faded to 1/e."""
SWEEP_MISSES = 0.01
"""Maximum share of a layer's experts that a step is expected to leave unused to count as a sweep over the layer."""


class PrefetchPlanner:
    """Plans prefetches for later layers, ranking missing experts by their chance of use.

    Experts of a pool have one size, so the chance also ranks the stall that a prefetch is expected to save.

    Args:
        num_experts: number of experts of each MoE layer.
        top_k: experts per token; the maximum where layers differ.
        lookahead: maximum number of layers ahead; a farther layer is considered only if the nearer ones need no
            fetch.
        max_experts: maximum prefetches in flight, near-certain ones not counted.
        cache: what is resident.
        expert_bytes: bytes of an expert of each layer; None: small.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        top_k: int,
        lookahead: int,
        max_experts: int,
        cache: Residents,
        expert_bytes: Sequence[int] | None = None,
    ) -> None:
        self.cache = cache
        self.num_experts = list(num_experts)
        self.top_k = top_k
        self.prompt_tokens = 0
        """Prompt tokens of the current step."""
        self.lookahead = lookahead
        self.max_experts = max_experts
        layers = len(num_experts)
        self.precision = [[Precision(top_k) for _ in range(lookahead)] for _ in range(layers)]
        self.pending: list[dict[int, PredictedExperts]] = [{} for _ in range(layers)]
        """Predictions for each layer's next event, by lookahead."""
        self.missing = [1.0] * layers
        """Mean number of experts that recent events of each layer found missing, prefetched ones included."""
        self.min_missing = [MAX_MIN_MISSING] * layers
        """Minimum of `missing` for predictions of each layer. A prefetch hides at most the time of a layer, in which a
        token's experts are read: below this rate predictions take more time than they save."""
        if expert_bytes is not None:
            self.min_missing = [min(MAX_MIN_MISSING, PREDICTION_BYTES / (top_k * size)) for size in expert_bytes]

    def record(self, layer: int, ids: np.ndarray, keep_mask: np.ndarray) -> None:
        """Updates the precision of the predictions for `layer` with what its router selected.

        Args:
            layer: MoE layer index.
            ids: selected experts, integer `[tokens, top_k]`.
            keep_mask: mask of those that gating kept, bool `[tokens, top_k]`.
        """
        pending = self.pending[layer]
        if not pending:
            return
        evaluated = [(distance, predicted) for distance, predicted in pending.items() if len(predicted.ids) == len(ids)]
        pending.clear()
        for distance, predicted in evaluated:
            self.precision[layer][distance - 1].record(predicted, ids, keep_mask)

    def record_missing(self, layer: int, missing: int) -> None:
        """Updates the mean number of missing experts of `layer` with one event's, prefetched ones included."""
        self.missing[layer] += (missing - self.missing[layer]) / MISSING_EVENTS

    def is_sweep(self, layer: int) -> bool:
        """Returns whether the step's prompts need nearly all experts of a layer, if tokens choose `top_k` at random.

        Real routing is uneven, so a few more experts stay unused. Gating drops hardly any expert for a whole prompt.
        """
        unused_share = (1 - min(1.0, self.top_k / self.num_experts[layer])) ** self.prompt_tokens
        return unused_share <= SWEEP_MISSES

    def has_targets(self, layer: int) -> bool:
        """Returns whether `plan` may prefetch for a later layer while `layer` runs."""
        last = len(self.num_experts) - 1
        sweeps = layer < last and self.is_sweep(layer + 1)
        for target in range(layer + 1, min(layer + self.lookahead, last) + 1):
            if (sweeps and not self.cache.is_complete(target)) or self._is_predicted(target):
                return True
        return False

    def _is_predicted(self, layer: int) -> bool:
        """Returns whether a layer has missing experts, and finds experts missing often enough to be predicted."""
        return self.missing[layer] >= self.min_missing[layer] and not self.cache.is_complete(layer)

    def plan_first_layers(
        self, prompt_tokens: int, chances: Sequence[np.ndarray], request: RequestPrefetch
    ) -> list[ExpertKey]:
        """Requests prefetches before a step, starting with the first layer; returns those queued.

        Args:
            prompt_tokens: prompt tokens of the step.
            chances: for each of the first layers, the chance that the step uses each expert, float `[experts]`.
            request: as in `plan`.
        """
        self.prompt_tokens = prompt_tokens
        if self.is_sweep(0):
            return self._sweep(-1, request)
        chosen: list[ExpertKey] = []
        for layer, layer_chances in enumerate(chances[: self.lookahead]):
            layer_chances = layer_chances.astype(np.float64, copy=False)  # numba knows no float16, which traces hold
            experts = np.empty(len(layer_chances), np.int64)
            count = _candidates(layer_chances, self.cache.slots_of(layer), MIN_CHANCE, experts)
            self._request(layer, experts[:count], layer_chances, request, chosen)
            if chosen:
                break
        return chosen

    def _sweep(self, layer: int, request: RequestPrefetch) -> list[ExpertKey]:
        """Requests all missing experts of the next layer with any, so that they arrive while this one computes."""
        for target in range(layer + 1, min(layer + 1 + self.lookahead, len(self.num_experts))):
            absent = np.flatnonzero(self.cache.slots_of(target)[: self.num_experts[target]] < 0).tolist()
            if chosen := [key for expert in absent if request(key := (target, expert), True)]:
                return chosen
        return []

    def _request(
        self,
        layer: int,
        experts: np.ndarray,
        chances: np.ndarray,
        request: RequestPrefetch,
        chosen: list[ExpertKey],
    ) -> None:
        """Requests as many of a layer's candidates as may be in flight, and adds those queued to `chosen`.

        Args:
            layer: MoE layer index.
            experts: candidates, the most probable first.
            chances: chance of each expert of the layer, `[experts]`.
            request: as in `plan`.
            chosen: receives the queued experts.
        """
        room = self.max_experts
        for expert in experts.tolist():
            near_certain = chances[expert] >= CERTAIN_PROB
            if not (near_certain or room):
                break
            if request((layer, expert), bool(near_certain)):
                chosen.append((layer, expert))
                room -= not near_certain

    def plan(
        self, layer: int, predict_experts: PredictExperts, request: RequestPrefetch, in_flight: int
    ) -> list[ExpertKey]:
        """Requests prefetches while `layer` runs, the most probable experts first; returns those queued.

        A prediction costs time in every layer, so none is made while prefetches are in flight.

        Args:
            layer: layer whose input the predictions are made from; -1: between two steps.
            predict_experts: called for predictions, nearest layer first.
            request: called for each candidate, with whether its use is near-certain; True if it was queued.
            in_flight: prefetches queued or in flight.
        """
        if 0 <= layer < len(self.num_experts) - 1 and self.is_sweep(layer + 1):
            return self._sweep(layer, request)
        chosen: list[ExpertKey] = []
        for distance in range(1, min(self.lookahead, len(self.num_experts) - 1 - layer) + 1):
            if chosen or in_flight:
                break
            target = layer + distance
            predicted = predict_experts(distance) if self._is_predicted(target) else None
            if predicted is None:
                continue
            self.pending[target][distance] = predicted
            chances = np.empty(self.num_experts[target])
            experts = np.empty(self.num_experts[target], np.int64)
            count = _predicted_candidates(
                predicted.ids, predicted.keep_mask, self.precision[target][distance - 1].by_rank,
                self.cache.slots_of(target), MIN_CHANCE, chances, experts,
            )  # fmt: skip
            if count:
                self._request(target, experts[:count], chances, request, chosen)
        return chosen


@compiled
def _predicted_candidates(
    ids: np.ndarray,
    keep_mask: np.ndarray,
    precision: np.ndarray,
    slots: np.ndarray,
    least: float,
    chances: np.ndarray,
    experts: np.ndarray,
) -> int:
    """Writes the `chances` of a layer's experts, and finds the candidates among them, as `_candidates`."""
    write_chances(ids, keep_mask, precision, chances)
    return _candidates(chances, slots, least, experts)


@compiled
def _candidates(chances: np.ndarray, slots: np.ndarray, least: float, experts: np.ndarray) -> int:
    """Finds the experts without a slot whose chance is `least` or more.

    Writes them to `experts`, the highest chance first, of equal ones the first expert; returns how many they are.
    """
    count = 0
    for expert in range(len(chances)):
        if chances[expert] < least or slots[expert] >= 0:
            continue
        place = count
        while place > 0 and chances[expert] > chances[experts[place - 1]]:
            experts[place] = experts[place - 1]
            place -= 1
        experts[place] = expert
        count += 1
    return count
