"""What is counted of a model's layers, where these are not all alike."""

import torch

from vllm_adapmoe.calibrate.statistics import LOOKAHEAD, add, norm_sums, prediction_sums, routing_profile, routing_sums
from vllm_adapmoe.profile import LayerProfile

TOKENS, EXPERTS = 40, 4


def test_a_layer_before_one_that_uses_more_experts():
    """Recall is a share of the later layer's experts, two here, where the layer itself uses one."""
    ids = torch.arange(TOKENS).remainder(EXPERTS).unsqueeze(1)
    sums = routing_sums(torch.ones(TOKENS, 1), ids, torch.arange(TOKENS) == 0, EXPERTS)
    add(sums, norm_sums(torch.ones(TOKENS, 8), ids.view(-1), EXPERTS))
    later = torch.cat((ids, (ids + 1) % EXPERTS), 1)
    add(sums, prediction_sums(later, later, 1))
    half_right = torch.cat((ids, (ids + 2) % EXPERTS), 1)
    add(sums, prediction_sums(half_right, later, LOOKAHEAD))
    layer = LayerProfile(sensitivity=1.0, **routing_profile(sums))
    assert layer.dropped == [] and layer.predictions is not None
    assert {one.lookahead: (one.recall, one.precision) for one in layer.predictions} == {
        1: (1.0, [1.0, 1.0]), LOOKAHEAD: (0.5, [1.0, 0.0]),
    }  # fmt: skip
