"""Computes the chance that a batch uses an expert from what next-token heads predict for each of its requests."""

import numpy as np

from vllm_adapmoe.policy.compiled import compiled

MIN_PROB, MAX_PROB = 0.005, 0.995
"""Bounds that predicted chances are clipped to: a head is linear, so an output may be outside [0, 1]."""
STEPS = 2048.0
"""Chances are rounded to multiples of its inverse, which float16, the dtype of a trace, can represent."""


def chance_of_any(outputs: np.ndarray) -> np.ndarray:
    """Returns the chance that the next step of a batch uses each expert: `1 - prod (1 - p)` over its requests.

    Args:
        outputs: `[requests, experts]` of a head, or `[requests, layers, experts]` of several.

    Returns:
        float32 `[experts]` or `[layers, experts]`, rounded to what a trace can hold, so that a replay sees the same
        values as the cache.
    """
    requests = outputs.reshape(len(outputs), -1)
    chances = np.empty(requests.shape[1], np.float32)
    _chance_of_any(requests, chances)
    return chances.reshape(outputs.shape[1:])


@compiled
def _chance_of_any(outputs: np.ndarray, chances: np.ndarray) -> None:
    for expert in range(outputs.shape[1]):
        unused = 1.0
        for request in range(len(outputs)):
            unused *= 1.0 - min(max(outputs[request, expert], MIN_PROB), MAX_PROB)
        chances[expert] = round((1.0 - unused) * STEPS) / STEPS
