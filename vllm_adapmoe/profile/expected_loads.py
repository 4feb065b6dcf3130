"""Derives each layer's expected loads, by number of slots, from a profile."""

import numpy as np

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.policy.allocation import expected_loads
from vllm_adapmoe.profile.model_profile import ModelProfile


def curves_of_profile(profile: ModelProfile, threshold: float, max_experts: int) -> list[np.ndarray]:
    """Returns the expected loads of each layer by slots (`expected_loads`), from a profile's routing statistics.

    Args:
        profile: profile with routing statistics.
        threshold: gating threshold; 0: no gating.
        max_experts: maximum number of prefetched experts; 0: no prefetch.

    Raises:
        AdapMoEError: the profile has no routing statistics.
    """
    curves = []
    for index, layer in enumerate(profile.layers):
        if layer.dropped is None or layer.popularity is None:
            raise AdapMoEError("the profile has no routing statistics; measure the model with `adapmoe calibrate`")
        limit = threshold / layer.sensitivity if layer.sensitivity > 0 else float("inf")
        # Share of tokens that keep more than m experts.
        more = [1.0, *(1 - histogram.below(limit)[0] for histogram in layer.dropped)]
        before = profile.layers[index - 1].predictions if index and max_experts else None
        precision = next((prediction.precision for prediction in before or () if prediction.lookahead == 1), [])
        curves.append(
            expected_loads(
                len(layer.popularity),
                sum(more),
                [right * share for right, share in zip(precision, more, strict=False)],
                max_experts,
            )
        )
    return curves
