"""What a comparison of policies refuses."""

import numpy as np
import pytest

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.simulate.compare import run_simulate
from vllm_adapmoe.simulate.trace import Step, TraceInfo, TraceWriter
from vllm_adapmoe.simulate.virtual_link import Machine


def test_no_further_ahead_than_the_trace_has_predictions(tmp_path):
    """Less would be simulated than was asked for, without a word."""
    writer = TraceWriter(tmp_path / "t", TraceInfo("a-model", [4, 4], 1, 4, [9, 9], [0, 0]), 1 << 20)
    writer.add(Step(0.0, ["a"], np.zeros(1), np.zeros((2, 1, 1), int), np.ones((2, 1, 1)), {}))
    writer.close()
    asked = [tmp_path / "t", [0.5], ["lru+prefetch"], Machine()]
    with pytest.raises(
        AdapMoEError, match=r"--lookahead 5: .* for 4 layers ahead; record it with prefetch.lookahead=5"
    ):
        run_simulate(*asked, lookahead=5, max_experts=1, profile=None)
    assert run_simulate(*asked, lookahead=4, max_experts=1, profile=None)["points"]
