"""What a controller leaves behind when a prediction fails under its hands."""

import numpy as np
import pytest

from vllm_adapmoe.experts import CacheShape, ExpertKey
from vllm_adapmoe.policy.controller import CacheController, CacheSetup
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.policy.residency import Load, State


class Submitted:
    """Transfers that only remember what they were asked for."""

    def __init__(self) -> None:
        self.speculated: list[ExpertKey] = []

    def demand(self, load: Load) -> None:
        pass

    def promote(self, key: ExpertKey) -> None:
        raise AssertionError(f"{key} was never submitted")

    def speculate(self, key: ExpertKey) -> None:
        self.speculated.append(key)


def test_what_a_failed_plan_has_queued_is_fetched():
    """Else the layer that asks for it later would wait for a load that nobody begins."""
    shape = CacheShape([4, 4], 2, [0, 0], [100, 100])
    controller = CacheController(shape, CacheSetup([32], lookahead=1, max_experts=4))
    controller.transfers = transfers = Submitted()
    said = PredictedExperts(np.array([[3, 7]]), np.ones((1, 2), dtype=bool))  # there is no expert 7
    controller.begin(0, [0])
    with pytest.raises(IndexError):
        controller.prefetch(0, (np.array([[0, 1]]), np.ones((1, 2), dtype=bool)), {1: said}.get)
    assert transfers.speculated == [(1, 3)]
    assert controller.residency(1).state((1, 3)) is State.QUEUED
    assert [load.key for load in controller.begin(1, [3]).loads] == [(1, 3)]
