"""RequestExperts: the experts that each running request is expected to use next, in the first layers."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_adapmoe.prefetch.heads import chance_of_any

REUSE = 0.45
"""Chance that a token uses an expert of its request's last token, used without next-token heads. The bundled models'
layers measure 0.29 to 0.47, 0.37 and 0.38 on average (`reuse` in examples/*/results.json); 0.25 would be random."""


STEPS_IN_FLIGHT = 8
"""Upper bound on steps whose end is reported late; vLLM's asynchronous scheduling has two in flight."""


class RequestExperts:
    """Collects, layer by layer of each step, the experts that each request's next token is expected to use.

    Those of the first layers, which are prefetched before a step: later layers are predicted while it runs.

    Args:
        layers: number of MoE layers to collect, from the first one.
        experts: maximum number of experts of a layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.names: Sequence[str] = ()
        self.chances: dict[str, np.ndarray] = {}
        """Chances of each request's next token, float32 `[layers, experts]`."""
        self._predicted: dict[int, np.ndarray] = {}
        self._used: dict[int, np.ndarray] = {}
        """Of each layer of the step so far: predictions `[requests, experts]`, or used experts `[requests, top_k]`."""
        self._ended: deque[set[str]] = deque(maxlen=STEPS_IN_FLIGHT)

    def begin(self, names: Sequence[str]) -> None:
        """Begins a step with these requests."""
        self.names = names
        self._predicted.clear()
        self._used.clear()

    def record_prediction(self, layer: int, chances: np.ndarray) -> None:
        """Records the prediction of a layer's next-token head.

        Args:
            layer: MoE layer index.
            chances: float `[requests, experts]`.
        """
        if len(chances) == len(self.names):
            self._predicted[layer] = chances

    def record_used(self, layer: int, ids: np.ndarray) -> None:
        """Records the experts of the requests' last tokens, without next-token heads: integer `[requests, top_k]`."""
        if len(ids) == len(self.names):
            self._used[layer] = ids

    def end(self) -> None:
        """Ends the step: keeps its predictions, except for requests that have ended meanwhile."""
        step = np.zeros((len(self.names), self.layers, self.experts), dtype=np.float32)
        for layer, chances in self._predicted.items():
            step[:, layer, : chances.shape[1]] = chances
        for layer, ids in self._used.items():
            step[np.arange(len(ids))[:, None], layer, ids] = REUSE
        ended = set().union(*self._ended)
        for name, request_chances in zip(self.names, step, strict=True):
            if name not in ended:
                self.chances[name] = request_chances

    def forget(self, names: Iterable[str]) -> None:
        """Forgets requests that have ended; also ignores them in steps whose end is reported later."""
        self._ended.append(set(names))
        for name in self._ended[-1]:
            self.chances.pop(name, None)

    def batch_chances(self, names: Sequence[str]) -> np.ndarray | None:
        """Returns `chance_of_any` of these requests, `[layers, experts]`; None: unknown."""
        known = [self.chances[name] for name in names if name in self.chances]
        return chance_of_any(np.stack(known)) if known else None
