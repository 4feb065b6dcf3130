"""Measurements that give an engine its answers, under model runner V2, which is vLLM's default on a GPU."""

import json

import pytest
from conftest import ROOT, TINY_MIXTRAL

from tests.integration.test_device_path import interpret
from vllm_adapmoe.integration.measure.forced_tokens import forcing_arguments

pytestmark = pytest.mark.engine


def test_forced_tokens_evaluate_frontier_and_ablation():
    """V2 refuses what forces tokens under V1 (a logits processor of its kind): its own trace replay does."""
    arguments = TINY_MIXTRAL, ROOT / "configs" / "tiny_mixtral.json", ROOT / "examples" / "tiny_mixtral" / "heldout"
    results = json.loads(interpret("run_v2_measurements.py", *map(str, arguments)).splitlines()[-1])
    assert set(results["runners"]) == {"vllm.v1.worker.cpu.model_runner"} and len(results["runners"]) == 5
    assert results["decode"] == pytest.approx(results["prefill"], abs=0.05), "log probabilities are the model's own"
    assert min(results["decode"]) > 1.0, "of tokens that it would not have said"
    assert results["best"][0] == results["best"][1]
    token, weight = results["evaluate"]["points"]
    assert token["mean_experts"] < 2 <= weight["mean_experts"] and token["loss_increase"] != 0
    assert results["evaluate"]["decode"]["tokens"] == 12
    off, gated = results["frontier"]["points"]
    assert off["bytes_per_token"] > gated["bytes_per_token"] > 0 and off["loss_increase"] == 0 != gated["loss_increase"]
    points = results["ablation"]["points"]
    assert [(one["family"], one["parts"]) for one in points] == [
        ("paper", []), ("paper", ["gating"]), ("ours", []), ("ours", ["gating"])
    ]  # fmt: skip
    assert all(one["demand_loads_per_token"]["median"] > 0 for one in points)


def test_under_v1_by_a_logits_processor():
    assert list(forcing_arguments()) == ["logits_processors"], "the CPU without Triton takes V1"
