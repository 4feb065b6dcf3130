"""Experts that each running request is expected to use next."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_adapmoe.prefetch.heads import chance_of_any

REUSE = 0.45
"""Chance that a token uses an expert of its request's last token, where nothing better is known: measured on the
bundled models, 0.25 by chance."""


STEPS_IN_FLIGHT = 8
"""That a step is told of later at most, generously: vLLM's asynchronous scheduling has two in flight."""


def bits(experts: np.ndarray) -> int:
    """Bool `[layers, experts]` as the bits of an integer."""
    return int.from_bytes(np.packbits(experts, bitorder="little").tobytes(), "little")


class RequestExperts:
    """Follows the steps of a worker layer by layer, and remembers what each request's next token is expected to use.

    Args:
        layers: MoE layers.
        experts: most of a layer.
        top_k: experts of a token.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.shape = layers, experts
        self.top_k = top_k
        self.names: Sequence[str] = ()
        self.step = np.zeros((0, *self.shape), dtype=np.float32)
        self.chances: dict[str, np.ndarray] = {}
        """float32 `[layers, experts]` of each request."""
        self._ended: deque[set[str]] = deque(maxlen=STEPS_IN_FLIGHT)

    def begin(self, names: Sequence[str]) -> None:
        """A step with these requests."""
        self.names = names
        self.step = np.zeros((len(names), *self.shape), dtype=np.float32)

    def predicted(self, layer: int, chances: np.ndarray) -> None:
        """What a layer's next-token head says.

        Args:
            layer: MoE layer index.
            chances: float `[requests, experts]`.
        """
        if len(chances) == len(self.names):
            self.step[:, layer, : chances.shape[1]] = chances

    def used(self, layer: int, ids: np.ndarray) -> None:
        """What the requests' last tokens used, where there is no such head: integer `[requests, top_k]`."""
        if len(ids) == len(self.names):
            self.step[np.arange(len(ids))[:, None], layer, ids] = REUSE

    def end(self) -> None:
        """The step has run. What it says of requests that have ended meanwhile is dropped."""
        ended = set().union(*self._ended)
        self.chances.update({name: its for name, its in zip(self.names, self.step, strict=True) if name not in ended})

    def top_expected(self) -> dict[str, int]:
        """Bits of the experts that each request of the last step is expected to use, `top_k` a layer."""
        if not len(self.step):
            return {}
        best = np.zeros(self.step.shape, dtype=bool)
        ids = np.argpartition(-self.step, self.top_k - 1, axis=2)[:, :, : self.top_k]
        np.put_along_axis(best, ids, True, axis=2)
        return {name: bits(experts) for name, experts in zip(self.names, best, strict=True)}

    def forget(self, names: Iterable[str]) -> None:
        """Requests that have ended with this step. A step that they were in may be told of later."""
        self._ended.append(set(names))
        for name in self._ended[-1]:
            self.chances.pop(name, None)

    def of_any(self, names: Sequence[str], layers: int) -> np.ndarray | None:
        """`chance_of_any` of the requests `names` for the first `layers`, `[layers, experts]`; None: nobody knows."""
        known = [self.chances[name][:layers] for name in names if name in self.chances]
        return chance_of_any(np.stack(known)) if known else None
