"""Finds the victim of an eviction: the evictable expert with the longest wait."""

from collections.abc import Sequence

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.compiled import compiled
from vllm_adapmoe.policy.eviction import EvictionPolicy

MAX_EVENTS = 256
"""Maximum number of events kept until the policy records them: a bound on memory."""


class Victims:
    """Keeps each layer's best victim, so that a search looks at layers, and only at experts of layers that changed.

    Args:
        policy: estimates the waits.
        evictable: bool `[layers, experts]`; set `changed[layer]` whenever its row changes.
    """

    def __init__(self, policy: EvictionPolicy, evictable: np.ndarray) -> None:
        self.policy = policy
        self.evictable = evictable
        layers = len(evictable)
        self.changed = np.ones(layers, dtype=bool)
        """Layers whose waits or evictable experts have changed since the last search."""
        self._best = np.full(layers, -1, dtype=np.int64)
        """Each layer's evictable expert with the longest wait; -1: none."""
        self._all = np.ones(layers, dtype=bool)
        self._events: list[tuple[int, np.ndarray, np.ndarray | None]] = []
        """Events that the policy has not recorded yet: it does so in a row, when a victim is wanted."""

    def record(self, layer: int, experts: np.ndarray, expected: np.ndarray | None) -> None:
        """Records an event, before the policy's next estimate.

        Args:
            layer: MoE layer index.
            experts: distinct ids, int64.
            expected: as in `EvictionPolicy.record`.
        """
        self._events.append((layer, experts, expected))
        if len(self._events) >= MAX_EVENTS:
            self.caught_up()

    def caught_up(self) -> EvictionPolicy:
        """Returns the policy, after it has recorded all events so far."""
        for layer, experts, expected in self._events:
            self.policy.record(layer, experts, expected)
            self.changed[layer] = True
        if self.policy.ages and self._events:
            self.changed.fill(True)
        self._events.clear()
        return self.policy

    def wait_of(self, key: ExpertKey) -> float:
        """Returns the policy's wait of one expert, after all events so far."""
        return self.caught_up().wait_of(key)

    def find(self, preferred: Sequence[np.ndarray] = ()) -> ExpertKey | None:
        """Returns the victim, of experts that wait equally long the first; None: no expert is evictable.

        Args:
            preferred: masks of layers, bool `[layers]`, the most preferred first; the victim is of a layer of the first
                mask with an evictable expert, of any layer if none has one.
        """
        self.caught_up()
        for allowed in (*preferred, self._all):
            layer = _longest_wait(
                self.policy.wait, self.policy.distance, self.evictable, self.changed, self._best, allowed
            )
            if layer >= 0:
                return layer, int(self._best[layer])
        return None


@compiled
def _longest_wait(
    wait: np.ndarray,
    distance: np.ndarray,
    evictable: np.ndarray,
    changed: np.ndarray,
    best: np.ndarray,
    allowed: np.ndarray,
) -> int:
    """Brings `best` up to date, and returns the allowed layer whose best victim waits longest; -1: there is none."""
    result = -1
    longest = -np.inf
    for layer in range(len(best)):
        if changed[layer]:
            changed[layer] = False
            best[layer] = -1
            row_longest = -np.inf
            for expert in range(wait.shape[1]):
                if evictable[layer, expert] and wait[layer, expert] > row_longest:
                    row_longest = wait[layer, expert]
                    best[layer] = expert
        if best[layer] < 0 or not allowed[layer]:
            continue
        layer_wait = wait[layer, best[layer]] + distance[layer]
        if layer_wait > longest:
            longest = layer_wait
            result = layer
    return result
