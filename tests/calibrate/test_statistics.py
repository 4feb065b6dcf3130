"""What is counted of a model's layers, where these are not all alike."""

import numpy as np
import pytest
import torch

from vllm_adapmoe.calibrate.run import ratio
from vllm_adapmoe.gating.rules import gate_tokens
from vllm_adapmoe.profile.model_profile import LayerProfile, ModelInfo, ModelProfile
from vllm_adapmoe.profile.statistics import LOOKAHEAD, add, prediction_sums, routing_profile, routing_sums

TOKENS, EXPERTS = 40, 4


def test_a_layer_before_one_that_uses_more_experts():
    """Recall is a share of the later layer's experts, two here, where the layer itself uses one."""
    ids = torch.arange(TOKENS).remainder(EXPERTS).unsqueeze(1)
    sums = routing_sums(torch.ones(TOKENS, 1), ids, EXPERTS)
    later = torch.cat((ids, (ids + 1) % EXPERTS), 1)
    add(sums, prediction_sums(later, later, 1))
    half_right = torch.cat((ids, (ids + 2) % EXPERTS), 1)
    add(sums, prediction_sums(half_right, later, LOOKAHEAD))
    layer = LayerProfile(sensitivity=1.0, **routing_profile(sums))
    assert layer.dropped == [] and layer.predictions is not None
    assert {one.lookahead: (one.recall, one.precision) for one in layer.predictions} == {
        1: (1.0, [1.0, 1.0]), LOOKAHEAD: (0.5, [1.0, 0.0]),
    }  # fmt: skip


def test_layers_of_one_expert_and_of_three():
    """A profile holds both: where one expert is used nothing can be dropped, at any threshold."""
    layers = []
    for top_k in (1, 3):
        weights = torch.rand(TOKENS, top_k, generator=torch.Generator().manual_seed(top_k))
        weights /= weights.sum(1, keepdim=True)
        ids = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(TOKENS)])
        sums = routing_sums(weights, ids, EXPERTS)
        cost = np.array([float(sums["half_cost"])])
        sensitivity, _ = ratio(cost * 2, cost)
        layers.append(LayerProfile(sensitivity=sensitivity, **routing_profile(sums)))
    assert [layer.sensitivity for layer in layers] == [0.0, 2.0]
    model = ModelInfo(name="m", architecture="a", hidden_size=8, num_layers=2, num_experts=EXPERTS, top_k=3)
    profile = ModelProfile(method="forward", source="a test", model=model, layers=layers)
    assert profile.layer_experts(0.0) == pytest.approx([1, 3])
    assert profile.layer_experts(1e9) == pytest.approx([1, 1])
    assert profile.threshold_for_experts(1.5) > 0
    assert gate_tokens(torch.ones(2, 1), 0.0, 1e9).keep_mask.all()
