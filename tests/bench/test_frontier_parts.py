"""Loss against bytes: which plans are run, and the least bytes at a limit of the loss."""

import pytest
from conftest import ROOT
from rich.console import Console

from benchmarks.frontier import BATCHES, FRACTIONS, least_bytes, plans, points_of, print_frontier
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
    assert least_bytes([point("off", 16, 0.0, 0.0)]) == {"precision": None, "together": None}, "nothing to save"
    noise = [point("off", 16, 1000.0, 0.0), point("token", 16, 800.0, -0.002), point("token", 16, 700.0, -0.001)]
    assert least_bytes(noise)["token"] == pytest.approx(0.7), "a gated model may happen to be better"


def test_the_tables_name_size_and_rule_apart(capsys):
    """`batch` is a number of requests, and the name of a rule."""
    points = [
        point(rule, 16, nbytes, loss)
        | {"resident": fraction, "batch": batch, "threshold": None, "mean_experts": 2.0, "loss_increase_stderr": 0.0}
        | {"predicted_loss_increase": None}
        for fraction in FRACTIONS
        for batch in BATCHES
        for rule, nbytes, loss in (("off", 1000.0, 0.0), ("batch", 250.0, 0.004))
    ]
    rows = [
        {"resident": fraction, "batch": batch, "shares": least_bytes(points_of(points, fraction, batch))}
        for fraction in FRACTIONS
        for batch in BATCHES
    ]
    print_frontier({"model": "m", "points": points, "least_bytes": rows}, Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["resident", "requests", "precision", "batch", "together"] for line in lines)
    assert sum(line.split()[2:] == ["1.00", "0.25", "0.25"] for line in lines if line.strip()) == len(rows)
