"""RequestExperts: the experts that each running request is expected to use next, in the first layers."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_adapmoe.policy.chances import chance_of_any

REUSE, REUSE_WEIGHT = 0.37, 8.0
"""Prior chance that a token uses an expert of its request's last token, used without next-token heads, weighted as so
many tokens. Of tiny_mixtral's 8 experts the layers re-use 0.29 to 0.47, 0.37 on average; of tiny_qwen3moe's 128 0.11 to
0.24 (`reuse` in examples/*/results.json)."""
REUSE_MEMORY = 512.0
"""Tokens after which the weight of older ones has faded to 1/e."""
MIN_REUSE = 1e-3
"""Lower bound of that chance: an expert with a chance of zero could not be told from one that was not used."""
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
        self._reused = np.full(layers, REUSE_WEIGHT * REUSE)
        self._observed = np.full(layers, REUSE_WEIGHT)
        """Share of re-used experts and number of tokens that it was measured on, summed with fading weights."""
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
            self._observe_reuse(layer, ids)
            step[np.arange(len(ids))[:, None], layer, ids] = self.reuse(layer)
        ended = set().union(*self._ended)
        for name, request_chances in zip(self.names, step, strict=True):
            if name not in ended:
                self.chances[name] = request_chances
        self.begin(())  # a step is not observed twice

    def reuse(self, layer: int) -> float:
        """Returns the chance that a token uses an expert of its request's last token."""
        return max(MIN_REUSE, float(self._reused[layer] / self._observed[layer]))

    def _observe_reuse(self, layer: int, ids: np.ndarray) -> None:
        """Updates `reuse` with the experts that the requests use now, `[requests, top_k]`."""
        shares = [
            np.count_nonzero(self.chances[name][layer, row]) / len(row)
            for name, row in zip(self.names, ids, strict=True)
            if name in self.chances
        ]
        fade = np.exp(-len(shares) / REUSE_MEMORY)
        self._reused[layer] = fade * self._reused[layer] + sum(shares)
        self._observed[layer] = fade * self._observed[layer] + len(shares)

    def forget(self, names: Iterable[str]) -> None:
        """Forgets requests that have ended; also ignores them in steps whose end is reported later."""
        self._ended.append(set(names))
        for name in self._ended[-1]:
            self.chances.pop(name, None)

    def batch_chances(self, names: Sequence[str]) -> np.ndarray | None:
        """Returns `chance_of_any` of these requests, `[layers, experts]`; None: unknown."""
        known = [self.chances[name] for name in names if name in self.chances]
        return chance_of_any(np.stack(known)) if known else None
