"""Experts of a bf16 checkpoint, quantised while they load: as stock vLLM on a checkpoint of the same integers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MIXTRAL
from tiny_models import VOCABULARY, save_tiny_model
from tiny_quantised import save_quantised_model
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, hidden_states, prompts
from tests.integration.test_architectures import PROMPT, check_gating
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.compat import runs_quantised_experts
from vllm_adapmoe.integration.entry import model_check
from vllm_adapmoe.integration.layers.precision import quantising_method
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint

EAGER = ENGINE_ARGS | {"enforce_eager": True}
HALF = VLLM_STEPS | {"cache_fraction": 0.5}
CHECKPOINTS = {8: "compressed_int8", 4: "rounded_int4"}
"""Checkpoints with the same integers and scales, written in the format of compressed-tensors."""
ASKED = prompts(8, VOCABULARY, seed=1)
TINY_QWEN3MOE = ROOT / "examples" / "tiny_qwen3moe" / "model"


@pytest.fixture(scope="module", autouse=True)
def supported():
    if not runs_quantised_experts():
        pytest.skip("vLLM's x86 kernels for quantised experts need AMX, or AVX-512 with VNNI and bf16")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What stock vLLM answers on the quantised checkpoint, and the output of its first MoE block."""
    seen: dict[int, tuple[list[Any], torch.Tensor]] = {}

    def ask(bits: int) -> tuple[list[Any], torch.Tensor]:
        if bits not in seen:
            folder = save_quantised_model(CHECKPOINTS[bits], tmp_path_factory.mktemp(f"int{bits}"))
            with Engine(folder, None, **EAGER) as engine:
                told = answers(engine, ASKED, greedy(logprobs=1))
                seen[bits] = told, hidden_states(engine, PROMPT)[0]
        return seen[bits]

    return ask


@pytest.mark.engine
@pytest.mark.parametrize("bits", [8, 4])
def test_the_tokens_of_a_quantised_checkpoint(bits, tiny_model, stock, tmp_path):
    """All resident; half, packed and restored; and from host memory."""
    expected, _ = stock(bits)
    store = {"store": "file", "store_dir": str(tmp_path)}
    caches = [VLLM_STEPS | {"cache_fraction": 1.0}, HALF | store, HALF | store, HALF | {"store": "host"}]
    pack = tmp_path / f"experts-0-of-1-int{bits}.pack"
    packed = []
    for number, cache in enumerate(caches):
        with Engine(tiny_model("mixtral"), cache | {"precision": bits}, **EAGER) as engine:
            assert answers(engine, ASKED, greedy(logprobs=1)) == expected
            if number == 0:
                continue
            assert engine.cache_stats()["misses"] > 0
            if number == 1:
                check_gating(engine, 2)
        packed.append(pack.stat().st_mtime_ns)
    assert len(set(packed)) == 1, "the second start reads what the first one packed"
    assert [path.name for path in tmp_path.glob("*.pack")] == [pack.name]


@pytest.mark.engine
@pytest.mark.parametrize("bits", [8, 4])
def test_several_waves_are_equal_within_rounding(bits, tiny_model, stock):
    theirs = stock(bits)[1].float()
    with Engine(
        tiny_model("mixtral"), VLLM_STEPS | {"cache_experts": 2, "store": "host", "precision": bits}, **EAGER
    ) as engine:
        ours = hidden_states(engine, PROMPT)[0].float()
    assert torch.allclose(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())


@pytest.mark.engine
@pytest.mark.parametrize("bits", [8, 4])
def test_a_budget_in_bytes_counts_the_quantised_expert(bits, tiny_model, tmp_path):
    """What holds every expert in so many bits, and not half of them in bf16, needs no store: known before loading."""
    expert = measure_checkpoint(tiny_model("mixtral"), None, None, bits, True)[1].expert_bytes  # as `precision: auto`
    budget = {"cache_gb": 24 * expert / 2**30, "store": "file", "store_dir": str(tmp_path), "precision": bits}
    with Engine(tiny_model("mixtral"), VLLM_STEPS | budget, **EAGER) as engine:
        answers(engine, ASKED[:1], greedy(logprobs=1))
    assert list(tmp_path.iterdir()) == []
    with Engine(tiny_model("mixtral"), VLLM_STEPS | budget | {"cache_gb": 23 * expert / 2**30}, **EAGER) as engine:
        assert engine.cache_stats()["slots"] == 23
    assert len(list(tmp_path.glob("*.pack"))) == 1


@pytest.mark.engine
def test_compiled_and_replaced(tiny_model, tmp_path):
    """New weights are quantised like the first ones."""
    args = ENGINE_ARGS | {"enable_prefix_caching": False}  # which does not know of new weights
    other = save_tiny_model("mixtral", tmp_path / "other", seed=1)
    cache = HALF | {"store": "host", "precision": 4}
    with Engine(tiny_model("mixtral"), cache, **args) as engine:
        expected = answers(engine, ASKED, greedy(logprobs=1))
    with Engine(other, cache, **args) as engine:
        assert answers(engine, ASKED, greedy(logprobs=1)) != expected
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model("mixtral"))})
        assert answers(engine, ASKED, greedy(logprobs=1)) == expected
        with pytest.raises(Exception, match=r"save_sharded_state does not work with precision=4"):
            engine.llm.collective_rpc("save_sharded_state", kwargs={"path": str(tmp_path / "state")})
    assert not (tmp_path / "state").exists()


@pytest.mark.engine
def test_groups_of_32(tmp_path):
    """Experts 32 weights wide, in the bundled model of 128."""
    config = {"cache_fraction": 0.5, "store": "host"}
    prompt = list(range(5, 69))
    losses = []
    for bits in (16, 4):
        with Engine(TINY_QWEN3MOE, VLLM_STEPS | config | {"precision": bits}, **EAGER) as engine:
            [answer] = engine.llm.generate(
                [TokensPrompt(prompt_token_ids=prompt)], SamplingParams(max_tokens=1, prompt_logprobs=0)
            )
            pairs = zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
            losses.append(-sum(logprobs[token].logprob for logprobs, token in pairs) / (len(prompt) - 1))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.engine
def test_a_router_of_sigmoids(tiny_model):
    """DeepSeek V3: bias, groups and a scaling factor. VLLM lists no such router for its kernels (`entry/edits.py`)."""
    deepseek = tiny_model("deepseek_v3")
    with Engine(deepseek, None, **EAGER) as engine:
        exact = hidden_states(engine, PROMPT)[0].float()
    seen = {}
    for bits, fraction in ((8, 0.5), (4, 0.5), (4, 1.0)):
        cache = VLLM_STEPS | {"cache_fraction": fraction, "store": "host", "precision": bits}
        with Engine(deepseek, cache, **EAGER) as engine:
            block = hidden_states(engine, PROMPT)[0].float()
            seen[bits, fraction] = answers(engine, ASKED, greedy(logprobs=1))
        error = (block - exact).norm() / exact.norm()
        assert 0 < error < {8: 0.02, 4: 0.2}[bits]
    assert seen[4, 0.5] == seen[4, 1.0] != seen[8, 0.5]


@pytest.mark.engine
def test_evaluate_compares_widths(tmp_path):
    command = [
        Path(sys.executable).with_name("adapmoe"), "evaluate", TINY_MIXTRAL, "--profile", "tiny_mixtral", "--data",
        ROOT / "examples" / "tiny_mixtral" / "heldout", "--tokens", "2048", "--precision-only",
        "--precision", "16,8,4", "-o", tmp_path / "result.json",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "result.json").read_text())["points"]
    rows = {point["bits"]: point for point in points if point["rule"] == "precision"}
    assert list(rows) == [8, 4] and all(row["mean_experts"] == 2 for row in rows.values())
    assert 0 < abs(rows[8]["loss_increase"]) < 0.005 and abs(rows[4]["loss_increase"]) < 0.02
    assert rows[8]["top1_agreement"] > rows[4]["top1_agreement"] > 0.9
    assert " 4 bit " in done.stdout and " 8 bit " in done.stdout


def configure(folder: Path, **args: Any) -> None:
    EngineArgs(
        model=str(folder), moe_method="adapmoe", adapmoe_config={"cache_fraction": 0.5, "precision": 4}, **args
    ).create_engine_config()


def test_refusals(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(AdapMoEError, match=r"quantised already; remove precision"):
        configure(save_quantised_model("gptq", tmp_path))
    for dtype in ("float32", "float16"):
        with pytest.raises(AdapMoEError, match=rf"dtype={dtype}.*set dtype=bfloat16"):
            configure(tiny_model("mixtral"), dtype=dtype)
    monkeypatch.setattr(model_check, "runs_quantised_experts", lambda: False)
    with pytest.raises(AdapMoEError, match=r"AVX-512 with VNNI and bf16, which this CPU lacks; remove precision"):
        configure(tiny_model("mixtral"))


def resolved(folder: Path, config: dict[str, Any], **args: Any) -> int:
    """Returns the precision that every process of an engine is told."""
    args = {"model": str(folder), "moe_method": "adapmoe", "max_model_len": 64} | args
    vllm_config = EngineArgs(adapmoe_config={"precision": "auto"} | config, **args).create_engine_config()
    return vllm_config.additional_config["adapmoe"].get("precision", 16)


def test_auto_follows_the_memory(tiny_model, tmp_path, monkeypatch):
    """24 experts of 98,304 bytes in bf16, 53,248 in int8 and 32,768 in int4, in records of whole pages."""
    mixtral = tiny_model("mixtral")
    for precision, nbytes in ((16, 98_304), (8, 53_248), (4, 32_768)):
        assert resolved(mixtral, {"cache_gb": 24 * nbytes / 2**30}) == precision
        assert resolved(mixtral, {"cache_gb": (24 * nbytes - 1) / 2**30}) == {16: 8, 8: 4, 4: 4}[precision]
    assert resolved(mixtral, {}) == 16, "all of this machine's memory"
    assert resolved(mixtral, {"cache_gb": 0.001, "store_dir": str(tmp_path)}) == 4, "whose pack has it in its name"
    assert resolved(mixtral, {}, gpu_memory_utilization=1e-4) == 4, "a share with no room for any"
    assert resolved(mixtral, {"cache_gb": 0.001}, dtype="float32") == 16, "vLLM's kernels do not take it"
    assert resolved(save_quantised_model("gptq", tmp_path), {"cache_gb": 0.001}) == 16
    # Half of 96 columns are no groups of 32: int8 is the least that a rank of two has a kernel for.
    narrow = Path(shutil.copytree(mixtral, tmp_path / "narrow"))
    settings = json.loads((narrow / "config.json").read_text()) | {"intermediate_size": 96}
    (narrow / "config.json").write_text(json.dumps(settings))
    assert resolved(narrow, {"cache_gb": 0.0001}) == 4
    assert resolved(narrow, {"cache_gb": 0.0001}, tensor_parallel_size=2) == 8
    monkeypatch.setattr(model_check, "runs_quantised_experts", lambda: False)
    assert resolved(mixtral, {"cache_gb": 0.001}) == 16


def test_auto_within_the_limit_of_the_loss(tmp_path):
    """The bundled profile says that 8 bits are within 0.05 % and 4 bits are not; below every limit is 16."""
    gating = {"profile": "tiny_mixtral", "gating": {"mode": "token", "max_loss_increase": 0.0005}, "cache_gb": 0.001}
    assert resolved(TINY_MIXTRAL, gating) == 8
    gating["gating"] = {"mode": "token", "max_loss_increase": 0.005}
    assert resolved(TINY_MIXTRAL, gating) == 4


def test_what_kernels_cannot_compute_is_refused():
    """Biases would be left out of the sums; weights on the input end in an error after the model has been packed."""
    moe: Any = SimpleNamespace(has_bias=True, hidden_dim=128, intermediate_size_per_partition=128)
    with pytest.raises(AdapMoEError, match=r"leave out the experts' biases; remove precision"):
        quantising_method(moe, 8, False)
    moe = SimpleNamespace(has_bias=False, hidden_dim=128, intermediate_size_per_partition=48)
    with pytest.raises(AdapMoEError, match=r"router weights on the experts' input; remove precision"):
        quantising_method(moe, 8, True)
    with pytest.raises(AdapMoEError, match=r"128 by 48 weights, which are not multiples of 32; set precision=8"):
        quantising_method(moe, 4, False)
