"""What a controller leaves behind when a prediction fails under its hands."""

import numpy as np
import pytest

from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.events import State
from vllm_adapmoe.policy.prediction import PredictedExperts


def test_a_plan_that_fails_queues_nothing():
    """Else the layer that requests it later would wait for a load that nobody begins."""
    shape = CacheShape([4, 4], 2, [0, 0], [100, 100])
    controller = CacheController(shape, CacheSetup([32], lookahead=1, max_experts=4))
    predicted = PredictedExperts(np.array([[3, 7]]), np.ones((1, 2), dtype=bool))  # there is no expert 7
    controller.begin(0, [0])
    with pytest.raises(IndexError):
        controller.prefetch(0, (np.array([[0, 1]]), np.ones((1, 2), dtype=bool)), {1: predicted}.get)
    assert controller.residency(1).state((1, 3)) is State.ABSENT
    assert [load.key for load in controller.begin(1, [3]).loads] == [(1, 3)]
