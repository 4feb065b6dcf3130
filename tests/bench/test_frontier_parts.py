"""Loss against bytes: which plans are run, and the least bytes at a limit of the loss."""

import pytest
from conftest import ROOT

from benchmarks.frontier import least_bytes, plans
from vllm_adapmoe.profile.model_profile import ModelProfile


def point(rule, precision, nbytes, loss):
    return {"rule": rule, "precision": precision, "bytes_per_token": nbytes, "loss_increase": loss}


def test_plans_for_several_precisions():
    profile = ModelProfile.load(ROOT / "configs" / "tiny_mixtral.json")
    whole, fewer = plans(profile), plans(profile, all_rules=False)
    assert whole[0] is None and fewer[0] is None
    assert [plan["rule"] for plan in fewer[1:]] == ["token"] * 2 + ["batch"] * 4
    assert all(plan in whole for plan in fewer)


def test_least_bytes_at_half_a_percent():
    """Between two points of a rule, by loss; a rule that never reaches the limit ends at its last point."""
    points = [
        point("off", 16, 1000.0, 0.0), point("token", 16, 800.0, 0.004), point("token", 16, 600.0, 0.006),
        point("batch", 16, 400.0, 0.003), point("weight", 16, 900.0, 0.02), point("count", 16, 950.0, 0.001),
        point("off", 8, 500.0, 0.0002), point("batch", 8, 300.0, 0.004),
        point("off", 4, 200.0, 0.006), point("batch", 4, 100.0, 0.008),
    ]  # fmt: skip
    shares = least_bytes(points)
    assert shares == pytest.approx(
        {
            "precision": 0.5,
            "token": 0.7,
            "batch": 0.4,
            "weight": 1 - 0.1 * 0.005 / 0.02,
            "count": 0.95,
            "together": 0.3,
        }
    )
    assert least_bytes(points[:-2])["together"] == pytest.approx(0.3)
