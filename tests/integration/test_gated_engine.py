"""Gating inside vLLM: what it costs in loss, what it saves, and what it must not depend on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL

from tests.apart import apart
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, greedy, prompts
from vllm_adapmoe.calibrate.text import read_sequences
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.gating.rules import Gated, gate_tokens
from vllm_adapmoe.integration.measure.engine import Engine, describe_model
from vllm_adapmoe.integration.measure.losses import decode_losses, prefill_losses
from vllm_adapmoe.profile.model_profile import ModelProfile

EXAMPLES = ROOT / "examples"
TINY_QWEN = EXAMPLES / "tiny_qwen3moe" / "model"
HELDOUT = EXAMPLES / "tiny_mixtral" / "heldout"
PROFILES = {TINY_MIXTRAL: ROOT / "configs" / "tiny_mixtral.json", TINY_QWEN: ROOT / "configs" / "tiny_qwen3moe.json"}
LENGTH = 128


def plan_of(model: Path, share: float, rule: str = "token") -> dict[str, Any]:
    """Gating by which a token loses `share` of the experts that it can lose."""
    profile = ModelProfile.load(PROFILES[model])
    top_k = profile.model.top_k
    threshold = profile.threshold_for_experts(top_k - share * (top_k - 1)) if share else 0.0
    return {"rule": rule, "threshold": threshold, "sensitivity": [layer.sensitivity for layer in profile.layers]}


def engine(model: Path, fraction: float) -> Engine:
    config = VLLM_STEPS | {"cache_fraction": fraction, "store": "host"}
    # No prefix cache: it would hand a gated run what was computed before gating was set.
    arguments = ENGINE_ARGS | {"enable_prefix_caching": False, "forced": True}
    return Engine(model, config, enforce_eager=True, **arguments)


ROUNDING = 0.015, 0.15
"""What rounding moves losses of tiny_mixtral by at most, at the quantiles 0.5 and 0.98."""


def assert_equal_but_for_rounding(ours: np.ndarray, theirs: np.ndarray, limits: Sequence[float] = ROUNDING) -> None:
    """Rounding to bf16 moves a loss by a hundredth, and now and then a router's choice with it.

    With more experts a choice moves more often; `limits` are of the same quantiles as `ROUNDING`.
    """
    difference = np.quantile(abs(ours - theirs), (0.5, 0.98))
    assert (difference < limits).all(), (difference, limits)
    assert ours.mean() == pytest.approx(theirs.mean(), rel=2e-3)


def reference_losses(model: Path, sequences: list[list[int]], plan: dict[str, Any]) -> np.ndarray:
    """The same gating in transformers, float32: what the router chose is gated before its experts run."""
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer, sensitivity in zip(reference.model.layers, plan["sensitivity"], strict=True):
        experts, forward = layer.mlp.experts, layer.mlp.experts.forward

        def gated(x, ids, weights, forward=forward, sensitivity=sensitivity):
            return forward(x, ids, gate_tokens(weights, sensitivity, plan["threshold"]).weights)

        experts.forward = gated
    ids = torch.tensor(sequences)
    with torch.inference_mode():
        logits = reference(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").numpy()


@pytest.mark.engine
@pytest.mark.parametrize("model", PROFILES, ids=["mixtral", "qwen3moe"])
def test_token_mode(model):
    """Loss as in transformers, the same in prefill and decode, tokens whatever is resident, and less to fetch."""
    sequences = read_sequences(model, HELDOUT, LENGTH, 12, seed=3)
    asked = prompts(8, 2048, seed=8)
    plan = plan_of(model, 0.4)

    def run(running: Engine) -> tuple[Any, ...]:
        outputs = running.llm.generate([{"prompt_token_ids": ids} for ids in asked], greedy(logprobs=2), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], running.cache_stats()

    # Nothing is fetched ahead, and each run starts with empty slots: what is missed does not depend on the clock.
    on_demand = {"cache_fraction": 0.5, "store": "host", "prefetch": {"lookahead": 0}}
    with engine(model, 0.5) as half:
        half.call("set_cache", on_demand)
        stock_tokens, before = run(half)
        off = prefill_losses(half, sequences)
        half.call("set_gating", plan_of(model, 0.0))
        # Pairs of token and expert are summed one by one here, in the kernel there: equal but for rounding.
        limits: Sequence[float] = ROUNDING
        if model != TINY_MIXTRAL:  # measured without gating, against transformers in float32
            ungated = apart(reference_losses, model, sequences, plan_of(model, 0.0))
            limits = 1.5 * np.quantile(abs(off.nats - ungated), (0.5, 0.98))
        assert_equal_but_for_rounding(prefill_losses(half, sequences).nats, off.nats, limits)
        half.call("set_gating", plan)
        half.call("set_cache", on_demand)
        gated_tokens, after = run(half)
        assert 0 < after["misses"] < before["misses"]
        assert after["kept_experts"] < 0.9 * after["gated_tokens"] * len(stock_tokens[0])
        half.call("set_gating", plan)
        prompt_losses = prefill_losses(half, sequences)
        kept = half.cache_stats()
        decoded = decode_losses(half, sequences, 4)
    experts = kept["kept_experts"] / kept["gated_tokens"]
    top_k = describe_model(model).top_k
    assert experts == pytest.approx(top_k - 0.4 * (top_k - 1), rel=0.03), "as the profile predicted"

    per_token = prompt_losses.nats.reshape(len(sequences), LENGTH - 1)[:, 3:].reshape(-1)
    assert_equal_but_for_rounding(decoded.nats, per_token, limits)
    reference = apart(reference_losses, model, sequences, plan)
    assert_equal_but_for_rounding(prompt_losses.nats, reference, limits)
    assert abs(prompt_losses.nats - off.nats).mean() > 3 * abs(prompt_losses.nats - reference).mean(), "it is gating"

    for fraction in (0.25, 1.0):
        with engine(model, fraction) as other:
            other.call("set_gating", plan)
            assert run(other)[0] == gated_tokens, f"{fraction} resident"


@pytest.mark.engine
def test_dropped_experts_cost_nothing():
    """As many rows in the kernel as pairs are kept, no fetch of what no token kept, and nothing when all is dropped."""
    with engine(TINY_MIXTRAL, 0.5) as running:
        running.call("set_gating", plan_of(TINY_MIXTRAL, 0.5))
        running.llm.collective_rpc(_watch_rows)
        run = [{"prompt_token_ids": ids} for ids in prompts(4, 2048, seed=1)]
        before = running.cache_stats()
        running.llm.generate(run, greedy(), use_tqdm=False)
        after = running.cache_stats()
        watched = running.llm.collective_rpc(_watched_rows)[0]
        assert watched["rows"] == after["kept_experts"] - before["kept_experts"]
        assert watched["experts"] == sum(after[key] - before[key] for key in ("hits", "misses"))
        assert watched["rows"] < 1.7 * (after["gated_tokens"] - before["gated_tokens"])

        # In batch mode an expert that is resident is never dropped, and a free fetch is never made.
        start = running.cache_stats()
        running.call("set_gating", plan_of(TINY_MIXTRAL, 0.5, "token"))
        running.llm.generate(run, greedy(), use_tqdm=False)
        token = running.cache_stats()
        running.call("set_gating", plan_of(TINY_MIXTRAL, 0.5, "batch") | {"threshold": 1e9})
        running.llm.generate(run, greedy(), use_tqdm=False)
        batch = running.cache_stats()
        assert batch["misses"] - token["misses"] < 0.7 * (token["misses"] - start["misses"])
        assert batch["kept_experts"] > batch["gated_tokens"], "what is resident is kept"


def _watch_rows(worker: Any) -> None:
    worker.watched = {"rows": 0, "experts": 0}
    for layer in worker.moe_layers:
        kernel, arrivals = layer._run_kernel, layer._arrivals

        def counted(x, weights, slots, kernel=kernel):
            if layer_is_live():
                worker.watched["rows"] += slots.numel()
            return kernel(x, weights, slots)

        def asked(experts, *others, arrivals=arrivals):
            worker.watched["experts"] += len(experts)
            return arrivals(experts, *others)

        layer._run_kernel, layer._arrivals = counted, asked


def layer_is_live() -> bool:
    from vllm.forward_context import get_forward_context

    return bool(get_forward_context().attn_metadata)


def _watched_rows(worker: Any) -> dict[str, int]:
    return worker.watched


def _looks_ahead(worker: Any) -> bool:
    return worker.predictor is not None


def same_bits(ours: Gated, theirs: Gated) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _watch_gates(worker: Any) -> None:
    """Compares what the compiled model has gated with what the rule gives for the same weights, run eagerly."""
    worker.compared = []
    for layer in worker.moe_layers:

        def compared(x, weights, ids, gated, layer=layer, run=layer.run_experts):
            if layer_is_live() and layer.gating is not None and layer.gating.plan.rule == "token":
                eager = gate_tokens(weights, layer.gating.sensitivity, layer.gating.threshold)
                worker.compared.append(gated is not None and same_bits(gated, eager))
            return run(x, weights, ids, gated)

        layer.run_experts = compared


def _compared(worker: Any) -> list[bool]:
    return worker.compared


@pytest.mark.engine
def test_a_compiled_rule_gates_as_an_eager_one():
    """To the last bit, whatever the number of tokens, and however inductor vectorises the choices."""
    compiled = torch.compile(gate_tokens, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 64, 500):
        weights = torch.randn(tokens, 8, generator=generator).mul(2).softmax(-1)
        weights[tokens // 2, :2] = weights[tokens // 2, 2]
        weights[0] = torch.nan if tokens == 500 else weights[0]
        for threshold in (0.0, 0.01, 1.0):
            limits = torch.tensor([2.0, threshold], dtype=torch.float64)
            eager, ours = gate_tokens(weights, *limits.tolist()), compiled(weights, *limits)
            assert torch.equal(eager.keep_mask, ours.keep_mask)
            for one, other in zip(eager[1:], ours[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.engine
@pytest.mark.versions
def test_configured_gating_compiled(monkeypatch):
    """`LLM(...)` with a loss budget and every expert resident: compiled, gated, and said in the log."""
    config = {
        "cache_fraction": 1.0,
        "profile": str(PROFILES[TINY_MIXTRAL]),
        "gating": {"mode": "token", "max_loss_increase": 0.005},
    }
    from vllm_adapmoe.integration.entry import switch
    from vllm_adapmoe.integration.layers import cached_experts, gates

    # Handlers would not do: some versions configure logging, and drop them, while the engine starts.
    said: list[str] = []
    monkeypatch.setattr(switch.logger, "info", lambda text, *args: said.append(text % args))
    with Engine(TINY_MIXTRAL, config, **ENGINE_ARGS) as running:
        assert running.generate(prompts(3, 2048, seed=4), 8).tokens
        stats = running.cache_stats()
        assert running.llm.collective_rpc(_looks_ahead) == [False], "there is nothing to look ahead for"

        running.llm.collective_rpc(_watch_gates)
        eagerly: list[Any] = []
        for module in (cached_experts, gates):
            monkeypatch.setattr(module, "gate_tokens", lambda *given: eagerly.append(given) or gate_tokens(*given))
        kept = []
        for share in (0.5, 0.1, None):  # plans take effect although the model was compiled for another one
            running.call("set_gating", None if share is None else plan_of(TINY_MIXTRAL, share))
            running.generate(prompts(3, 2048, seed=4), 8)
            kept.append(running.call("kept_by_layer"))
        running.call("set_gating", plan_of(TINY_MIXTRAL, 0.5, "batch"))
        running.generate(prompts(1, 2048, seed=4), 2)
        assert set(running.call("kept_by_layer")) == {2.0}, "what is resident is kept in batch mode"
        (compared,) = running.llm.collective_rpc(_compared)
        assert compared and all(compared)
        assert not eagerly, "the compiled model did not gate"
        assert sum(kept[0]) < sum(kept[1]) and not kept[2]
    profile = ModelProfile.load(PROFILES[TINY_MIXTRAL])
    predicted = profile.mean_experts(profile.threshold_for_loss(0.005))
    assert stats["misses"] == 0
    assert stats["kept_experts"] / stats["gated_tokens"] < 2
    (line,) = [text for text in said if "Adaptive gating (token)" in text]
    assert f"{predicted:.2f} of 2 experts per token (by layer " in line
    assert line.endswith("loss +0.50%")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gating": {"mode": "token"}, "profile": "p"}, "mode=token takes exactly one of threshold, target_experts"),
        ({"gating": {"mode": "token", "threshold": 0.1}}, "gating.mode=token needs a profile"),
        (
            {"gating": {"mode": "token", "threshold": 0.1}, "profile": "none.json"},
            "profile='none.json' is neither a file nor the name",
        ),
        ({"gating": {"mode": "token", "target_experts": 3}, "profile": "own"}, "target_experts=3.0 is not possible"),
        ({"gating": {"mode": "token", "threshold": 0.1}, "profile": "qwen"}, "is for another model"),
        ({"gating": {"mode": "token", "threshold": 0.1}, "profile": "8x7b"}, "is for another model (Mixtral-8x7B)"),
        ({"profile": "bare"}, "has no next-token heads, so it has no effect while gating.mode=off"),
        (
            {"profile": "bare", "eviction": "next_token"},
            "has no next-token heads; make it again with adapmoe calibrate",
        ),
        ({"profile": "alone"}, "put the file beside the profile"),
    ],
)
def test_refusals_come_before_the_weights(config, message, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    own = ModelProfile.load(PROFILES[TINY_MIXTRAL])
    own.save(tmp_path / "alone.json")  # without its heads, which it asks for
    own.model_copy(update={"heads": None}).save(tmp_path / "bare.json")
    paths = {
        "own": PROFILES[TINY_MIXTRAL],
        "qwen": PROFILES[TINY_QWEN],
        "8x7b": ROOT / "configs" / "mixtral_8x7b.json",
        "alone": tmp_path / "alone.json",
        "bare": tmp_path / "bare.json",
    }
    config = {key: str(paths.get(value, value)) if key == "profile" else value for key, value in config.items()}
    arguments = EngineArgs(model=str(TINY_MIXTRAL), moe_method="adapmoe", adapmoe_config=config)
    with pytest.raises(AdapMoEError) as caught:
        arguments.create_engine_config()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.engine
@pytest.mark.parametrize("method", ["forward", "fisher"])
def test_calibration_goes_on_where_it_was_killed(tmp_path, method):
    """And gives the same file as one that was not killed, though that had every expert in memory and this has not."""

    def command(output: Path, cache: str) -> list[str]:
        binary = str(Path(sys.executable).parent / "adapmoe")
        data = str(EXAMPLES / "tiny_mixtral" / "calibration")
        arguments = ["--data", data, "--method", method, "--tokens", "4096", "--sequence-length", "64"]
        arguments += ["--precision", "4"] if method == "fisher" else []
        return [binary, "calibrate", str(TINY_MIXTRAL), *arguments, "--adapmoe-config", cache, "-o", str(output)]

    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    environment = os.environ | {"COLUMNS": "120"}
    subprocess.run(command(whole, "{}"), check=True, capture_output=True, env=environment, timeout=400)
    partial = killed.with_name("killed.json.partial")
    offloaded = command(killed, '{"cache_fraction": 0.25, "store": "host"}')
    process = subprocess.Popen(
        offloaded, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    again = subprocess.run(offloaded, check=True, capture_output=True, text=True, env=environment, timeout=400)
    assert "resuming from" in again.stderr + again.stdout
    assert killed.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    profile = ModelProfile.load(whole)
    assert profile.model == describe_model(TINY_MIXTRAL).model_copy(update={"num_layers": 12})
    assert profile.data.tokens == 64 * 63
    sensitivities = [layer.sensitivity for layer in profile.layers]
    assert sensitivities[0] == max(sensitivities)
    assert sensitivities[0] > 5 * max(sensitivities[1:])
    assert json.loads(whole.read_text())["layers"][0]["predictions"][0]["lookahead"] == 1
    costs = {cost.precision: cost for cost in profile.rounding}
    assert list(costs) == ([4] if method == "fisher" else [])
    assert all(abs(cost.measured_loss_increase) < 0.02 * profile.base_loss for cost in costs.values())
    assert all(0 < cost.measured_stderr < 0.02 for cost in costs.values())
