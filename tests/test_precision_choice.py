"""`precision: auto`: the widest that fits, else the least bytes per token, within the limit of the loss."""

from dataclasses import replace

import pytest

from tests.test_profile import profile_of
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.planning.memory_plan import ModelSize
from vllm_adapmoe.planning.precision_choice import choose_precision
from vllm_adapmoe.profile.model_profile import RoundingCost

WIDE = ModelSize(num_layers=3, num_experts=16, top_k=4, expert_bytes=1600, other_bytes=0, read_bytes=0, all_layers=3)
SIZES = {16: WIDE, 8: replace(WIDE, expert_bytes=800), 4: replace(WIDE, expert_bytes=500)}
"""48 experts: 76800, 38400 and 24000 bytes."""


def costs(**nats):
    return [
        RoundingCost(precision=int(bits.removeprefix("bits")), measured_loss_increase=rise, measured_stderr=0.0)
        for bits, rise in nats.items()
    ]


@pytest.mark.parametrize(
    ("room", "precision"),
    [(10**6, 16), (76800, 16), (76799, 8), (38400, 8), (38399, 4), (24000, 4), (23999, 4), (1000, 4), (0, 4)],
)
def test_the_widest_that_fits_else_the_least_bytes(room, precision):
    chosen, reason = choose_precision(SIZES, room, None, None)
    assert chosen == precision
    assert ("all experts fit" in reason) == (room >= 24000)


@pytest.mark.parametrize(
    ("limit", "room", "precision"),
    [
        (0.005, 1000, 4),  # 0.01 nats of a loss of 2.0
        (0.003, 1000, 8),  # 4 bits cost 0.004
        (0.0005, 1000, 8),
        (0.0004, 1000, 16),  # 8 bits cost 0.001, all that is allowed
        (0.0004, 38400, 16),
    ],
)
def test_within_the_limit_of_the_loss(limit, room, precision):
    profile = profile_of(4, rounding=costs(bits8=0.0009, bits4=0.007))
    assert choose_precision(SIZES, room, profile, limit)[0] == precision


def test_gating_may_make_the_wider_one_cheaper():
    """4 bits that cost nearly the whole limit leave little to drop; 8 bits of hardly more bytes leave all of it."""
    profile = profile_of(4, rounding=costs(bits8=0.0, bits4=0.0199))
    sizes = SIZES | {8: replace(WIDE, expert_bytes=510)}
    assert choose_precision(sizes, 6000, profile, 0.01)[0] == 8
    assert (
        choose_precision(sizes, 6000, profile.model_copy(update={"rounding": costs(bits8=0.0, bits4=0.0)}), 0.01)[0]
        == 4
    )


def test_a_cost_that_was_not_measured_is_needed_only_where_it_matters():
    profile = profile_of(4, rounding=costs(bits8=0.001))
    assert choose_precision(SIZES, 76800, profile, 0.005)[0] == 16
    assert choose_precision(SIZES, 38400, profile, 0.005)[0] == 8
    with pytest.raises(AdapMoEError, match=r"does not say what precision=4 costs.*calibrate --precision 8,4"):
        choose_precision(SIZES, 38399, profile, 0.005)


def test_a_profile_without_a_loss_limits_nothing():
    profile = profile_of(4).model_copy(update={"base_loss": None, "method": "published"})
    with pytest.raises(AdapMoEError, match=r"needs a calibrated profile, this one is published"):
        choose_precision({16: WIDE}, 10**6, profile, 0.005)


@pytest.mark.parametrize("budget", [{"cache_fraction": 1.0}, {"cache_experts": 8}])
def test_needs_a_budget_in_bytes(budget):
    with pytest.raises(AdapMoEError, match=r"precision=auto chooses by memory.*set cache_gb"):
        AdapMoEConfig.parse(budget | {"precision": "auto"})
    assert AdapMoEConfig.parse({"precision": "auto"}).precision == "auto"
    assert AdapMoEConfig.parse({"precision": "auto", "cache_gb": 2}).cache_gb == 2
