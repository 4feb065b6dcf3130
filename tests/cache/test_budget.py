"""Slots that a budget buys."""

import pytest

from vllm_adapmoe.cache.budget import ExpertShape, GiB, count_slots
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError

MIXTRAL = ExpertShape(num_experts=256, bytes_per_expert=GiB // 4, top_k=2)


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ({"cache_experts": 128}, 128),
        ({"cache_experts": 256}, 256),
        ({"cache_fraction": 0.5}, 128),
        ({"cache_fraction": 1.0}, 256),
        ({"cache_gb": 8.0}, 32),
        ({"cache_gb": 8.2}, 32),
        ({"cache_gb": 1000.0}, 256),
        ({}, 64),
    ],
)
def test_slots_of_one_shape(budget, slots):
    assert count_slots(AdapMoEConfig(**budget), [MIXTRAL], free_bytes=16 * GiB) == [slots]


def test_shapes_share_a_budget_by_their_bytes():
    shapes = [MIXTRAL, ExpertShape(num_experts=64, bytes_per_expert=GiB // 2, top_k=4)]
    assert count_slots(AdapMoEConfig(cache_fraction=0.25), shapes, 0) == [64, 16]
    assert count_slots(AdapMoEConfig(cache_gb=48.0), shapes, 0) == [128, 32]


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ({"cache_experts": 1}, "cache_experts=1"),
        ({"cache_experts": 257}, "cache_experts=257"),
        ({"cache_fraction": 0.001}, "cache_fraction=0.001"),
        ({"cache_gb": 0.3}, "cache_gb=0.3"),
        ({}, "free memory"),
    ],
)
def test_an_impossible_budget_is_named_with_its_remedy(budget, named):
    with pytest.raises(AdapMoEError, match=named) as error:
        count_slots(AdapMoEConfig(**budget), [MIXTRAL], free_bytes=-GiB)
    assert "\n" not in str(error.value) and "set at" in str(error.value)
