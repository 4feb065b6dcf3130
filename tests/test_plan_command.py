"""`adapmoe plan`, as a user runs it, without an engine."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import ROOT, TINY_MIXTRAL
from transformers import AutoConfig
from typer.testing import CliRunner

from vllm_adapmoe.cli.app import app
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint, measure_step
from vllm_adapmoe.planning.from_trace import gated
from vllm_adapmoe.planning.link import measure_link, measure_weights
from vllm_adapmoe.planning.token_time import DECIDING_KERNELS, KERNEL_SECONDS
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.simulate.trace import Step, TraceInfo, TraceWriter
from vllm_adapmoe.store.record import align

PROFILE = ROOT / "configs" / "tiny_mixtral.json"
SPEEDS = ["--link", "1", "--compute", "0.5"]
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def mixtral(tmp_path):
    """The folder of a checkpoint that was not downloaded: its configuration alone."""
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return folder


def plan(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", *map(str, arguments)])


def refusal(*arguments) -> str:
    error = plan(*arguments).exception
    assert isinstance(error, OneLineError), error
    assert "\n" not in str(error)
    return str(error)


def test_sizes_of_a_configuration(mixtral):
    info, size = measure_checkpoint(mixtral, None, None)
    assert (info.architecture, info.hidden_size, info.num_layers, info.num_experts, info.top_k) == (
        "MixtralForCausalLM", 4096, 32, 8, 2,
    )  # fmt: skip
    assert size.expert_bytes == 3 * 4096 * 14336 * 2
    attention, gate, norms = 2 * 4096 * 4096 + 2 * 4096 * 1024, 8 * 4096, 2 * 4096
    other = 32 * (attention + gate + norms) + 4096 + 2 * 32000 * 4096
    assert size.other_bytes == 2 * other
    assert size.read_bytes == 2 * (other - 32000 * 4096)
    assert measure_checkpoint(mixtral, None, 4.5)[1].expert_bytes == 3 * 4096 * 14336 * 4.5 / 8


@pytest.mark.engine
def test_sizes_of_real_weights(tiny_model, tmp_path):
    # In a process of its own, as a user runs it: vLLM's Transformers backend, in this process for another test,
    # decorates transformers' own classes, and they cannot be built without an engine any more.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        folders = [tiny_model(architecture) for architecture in ("qwen3_moe", "deepseek_v3")]
        measured = list(process.map(measure_checkpoint, folders, [None] * 2, [None] * 2))
        AutoConfig.for_model("jetmoe", num_hidden_layers=2).save_pretrained(tmp_path)  # experts, but none are fused
        with pytest.raises(AdapMoEError, match="has no routed experts"):
            process.submit(measure_checkpoint, tmp_path, None, None).result()
    shapes = [(3, 16, 4), (2, 8, 3)]
    for folder, (_, size), (layers, experts, top_k) in zip(folders, measured, shapes, strict=True):
        assert (size.num_layers, size.num_experts, size.top_k, size.all_layers) == (layers, experts, top_k, 3)
        assert size.expert_bytes == 3 * 128 * 64 * 2
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size.other_bytes + size.experts * size.expert_bytes == pytest.approx(stored, rel=0.01)


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}
GEMMA = SMALL | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
SIZES = {
    # Settings, and layers with experts, all layers, experts of a layer, experts of a token, intermediate size.
    "afmoe": (SMALL | {"num_hidden_layers": 5, "num_dense_layers": 2, "moe_intermediate_size": 32}, (3, 5, 64, 6, 32)),
    "dbrx": ({"d_model": 64, "n_heads": 2, "n_layers": 2, "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4},
              "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
             (2, 2, 4, 2, 32)),
    "deepseek_v3": ({"num_hidden_layers": 4}, (1, 4, 256, 8, 2048)),
    "ernie4_5_moe": ({"num_hidden_layers": 4}, (3, 4, 64, 6, 1536)),
    "gemma4_text": (GEMMA | {"num_hidden_layers": 6}, (6, 6, 8, 2, 32)),
    "gemma4": ({"text_config": GEMMA | {"num_hidden_layers": 6}}, (6, 6, 8, 2, 32)),
    "kimi_linear": ({"num_hidden_layers": 4}, (3, 4, 256, 8, 1024)),
    "lfm2_moe": ({"num_hidden_layers": 4, "num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * 2},
                 (2, 4, 32, 4, 1792)),
    "llama4": ({"text_config": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}}, (2, 4, 16, 1, 8192)),
    "longcat_flash": ({"num_layers": 2}, (2, 4, 512, 12, 2048)),
    "qwen3_vl_moe": ({"text_config": {"num_hidden_layers": 2, "decoder_sparse_step": 2}}, (1, 2, 60, 4, 1408)),
}  # fmt: skip


def test_sizes_of_models_that_name_things_their_own_way(tmp_path):
    """Experts after dense layers, every other layer, in a nested configuration, beside a vision tower, ..."""
    for kind, (settings, (layers, every_layer, experts, top_k, inner)) in SIZES.items():
        folder = tmp_path / kind
        AutoConfig.for_model(kind, **settings).save_pretrained(folder)
        info, size = measure_checkpoint(folder, None, None)
        assert (size.num_layers, size.all_layers, size.num_experts, size.top_k) == (
            layers, every_layer, experts, top_k
        ), kind  # fmt: skip
        assert size.expert_bytes == align(3 * info.hidden_size * inner * 2), kind
        step = measure_step(folder, None, 1024)
        assert step.inner == inner and step.kv_bytes > 0, kind


def test_a_plan_with_gating_and_its_configuration(tmp_path):
    files = {name: tmp_path / name for name in ("config.json", "result.json", "plan.png")}
    run = plan(
        TINY_MIXTRAL, "--profile", PROFILE, "--memory", "15MiB", "--reserve", "1MiB", "--max-loss-increase", 0.005,
        *SPEEDS, "-o", files["config.json"], "--result", files["result.json"], "--plot", files["plan.png"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert max(map(len, run.output.splitlines())) <= 80 and "…" not in run.output
    assert "--memory" in run.output and "1.44 experts per token and layer" in run.output
    assert "closed form: every expert equally likely" in run.output
    config = AdapMoEConfig.parse(files["config.json"])
    result = json.loads(files["result.json"].read_text())
    (variant,) = result["variants"]
    (asked,) = [point for point in variant["points"] if point["asked"]]
    assert config.cache_experts == asked["slots"] and config.allocation == "pool"
    assert config.profile == str(PROFILE) and config.gating.max_loss_increase == 0.005
    assert asked["memory"] <= result["memory"] == 15 << 20
    assert asked["gated"]["tokens_per_second"] > asked["ungated"]["tokens_per_second"]
    assert result["environment"]["command"]
    assert files["plan.png"].read_bytes().startswith(b"\x89PNG")


def test_a_published_profile_and_no_weights(mixtral, tmp_path):
    output = tmp_path / "config.json"
    options = [mixtral, "--profile", ROOT / "configs" / "mixtral_8x7b.json", "--memory", "24GiB", *SPEEDS]
    assert "KV cache of 131072 tokens" in refusal(*options)  # transformers' default of the most
    assert "set only one" in refusal(*options, "--reserve", "2GiB", "--max-model-len", 32768)
    options += ["--max-model-len", 32768]
    run = plan(*options, "--expert-bits", 4.5, "-o", output)
    assert run.exit_code == 0, run.output
    assert "assumed" in run.output and "256 experts of 94.5 MiB, 23.62 GiB in all" in run.output
    said = " ".join(run.output.split())
    assert "8% of the memory and " in said and "4.00 GiB KV cache of 32768 tokens" in said and " CUDA graphs" in said
    assert AdapMoEConfig.parse(output).transport() == {"cache_experts": 127}
    several = plan(*options, "--expert-bits", "16,8,4.5")
    assert sum(line.startswith(" > ") for line in several.output.splitlines()) == 3
    assert "constants only" in refusal(*options, "--max-loss-increase", 0.005)
    assert "routing statistics" in refusal(*options, "--allocation", "profile")


def write_trace(path, expert_bytes: int, layers: int = 12) -> None:
    generator = np.random.default_rng(0)
    writer = TraceWriter(path, TraceInfo("m", [8] * layers, 2, 0, [expert_bytes] * layers, [0] * layers), 1 << 30)
    for number in range(40):
        ids = np.stack([generator.permutation(8)[:2] for _ in range(layers)])[:, None]
        weights = np.tile(np.array([0.9, 0.1], dtype=np.float16), (layers, 1, 1))
        writer.add(Step(float(number), ["r"], np.array([number], dtype=np.int32), ids, weights, {}))
    writer.close()


def test_precision(mixtral, tmp_path):
    """The sizes are those of vLLM's formats: a GPU's with a link that is given, else this machine's."""
    result, output = tmp_path / "result.json", tmp_path / "config.json"
    done = plan(mixtral, "--precision", "16,8,4", "--memory", "24GiB", "--reserve", "2GiB", *SPEEDS, "--result", result)
    assert done.exit_code == 0, done.exception
    printed = " ".join(done.output.split())  # a title with a long path is wrapped
    assert "experts of precision 8" in printed and "experts of precision 4" in printed
    weights = 3 * 4096 * 14336
    rows = 2 * 14336 + 4096
    variants = json.loads(result.read_text())["variants"]
    sizes = [variant["size"]["expert_bytes"] for variant in variants]
    assert sizes == [2 * weights, align(weights + 4 * rows), align(weights // 2 + 2 * weights // 64)]
    assert [variant["config"]["precision"] for variant in variants] == [16, 8, 4]
    assert measure_checkpoint(mixtral, None, None, 4, on_cpu=True)[1].expert_bytes == align(
        weights // 2 + 9 * weights // 64
    )
    assert (
        plan(mixtral, "--precision", "8", "--memory", "24GiB", "--reserve", "2GiB", *SPEEDS, "-o", output).exit_code
        == 0
    )
    assert AdapMoEConfig.parse(json.loads(output.read_text())).precision == 8
    assert "--output takes one configuration; --precision 8,4 has 2" in refusal(
        mixtral, "--precision", "8,4", "-o", output, "--memory", "24GiB"
    )
    assert "--precision 6 is not known; use 16, 8 or 4" in refusal(mixtral, "--precision", "6", *SPEEDS)
    assert "set only one of them" in refusal(mixtral, "--precision", "8", "--expert-bits", "8", *SPEEDS)
    (mixtral / "config.json").write_text(json.dumps(MIXTRAL | {"intermediate_size": 14320}))
    assert "not multiples of 32; use 8" in refusal(mixtral, "--precision", "4", *SPEEDS)


def test_a_trace_is_replayed(tmp_path):
    trace = tmp_path / "trace"
    write_trace(trace, 1)
    result = tmp_path / "result.json"
    run = plan(
        TINY_MIXTRAL, "--profile", PROFILE, "--trace", trace, "--max-loss-increase", 0.005, *SPEEDS, "--result", result
    )
    assert run.exit_code == 0, run.output
    assert "replay of a trace" in run.output
    points = json.loads(result.read_text())["variants"][0]["points"]
    assert [point["slots"] for point in points] == [10, 19, 29, 38, 48, 58, 67, 77, 86, 96]
    for point in points:
        one, other = point["ungated"], point["gated"]
        assert one["hits"] + one["loads"] == pytest.approx(24)
        assert other["loads"] < one["loads"] or one["loads"] == 0
        # Nothing was predicted, so what was loaded is what was waited for, in records of this model's size.
        assert one["fetched_bytes"] == pytest.approx(one["loads"] * 3 * 128 * 256 * 2)
        deciding = 12 * DECIDING_KERNELS * KERNEL_SECONDS if point["slots"] < 96 else 0.0
        seconds = 12 * 0.0005 + deciding + one["fetched_bytes"] / 1e9
        assert one["tokens_per_second"] == pytest.approx(1 / seconds, rel=0.01)
    assert points[-1]["ungated"]["loads"] == 0
    write_trace(trace, 1, layers=3)
    assert "was recorded with another model (m)" in refusal(TINY_MIXTRAL, "--trace", trace, *SPEEDS)


def test_host_memory_between_a_gpu_and_the_disk(mixtral, tmp_path):
    """Mixtral in 24 GiB of a GPU and 16 GiB of host memory; a GiB holds three of its experts."""
    result, config = tmp_path / "result.json", tmp_path / "config.json"
    options = [mixtral, "--memory", "24GiB", "--reserve", "2GiB", "--link", "25", "--compute", "0.6"]
    speeds = []
    for tier in ([], ["--host", "16GiB", "--disk", "5"], ["--host", "84GiB", "--disk", "5"]):
        run = plan(*options, *tier, "--result", result, "-o", config)
        assert run.exit_code == 0, run.output
        (variant,) = json.loads(result.read_text())["variants"]
        (asked,) = [point for point in variant["points"] if point["asked"]]
        speeds.append(asked["ungated"]["tokens_per_second"])
        parsed = AdapMoEConfig.parse(config)
        assert parsed.host_gb == (float(tier[1].removesuffix("GiB")) if tier else None)
        assert variant["decode"]["decided_by"] == ("host" if tier[1:2] == ["16GiB"] else "device")
        assert f"decided by the {variant['decode']['decided_by']}," in run.output
        assert "experts in" not in run.output if not tier else "of host memory; disk: 5.00 GB/s" in run.output
    assert speeds[2] == speeds[0] > 2 * speeds[1]
    assert "set --link to plan for one" in refusal(mixtral, "--memory", "24GiB", "--host", "16GiB")
    assert "--disk=slow is not usable" in refusal(*options, "--host", "16GiB", "--disk", "slow")
    assert "--host=1MiB holds no expert of 0.3281 GiB" in refusal(*options, "--host", "1MiB", "--disk", "5")
    assert "--disk=5 has no effect without --host" in refusal(*options, "--disk", "5")


def test_a_cpu_decides_nothing_on_a_device(tmp_path, monkeypatch):
    """Where slots are in host memory, a token takes computing and reads from the disk, and nothing else."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vllm_adapmoe.planning.plan.measure_link", lambda nbytes, folder: (1e9, "a test"))
    monkeypatch.setattr("vllm_adapmoe.planning.plan.measure_weights", lambda: (1e10, "a test"))
    run = plan(TINY_MIXTRAL, "--result", tmp_path / "result.json")
    assert run.exit_code == 0, run.output
    assert "decided by" not in run.output and "kernels a layer" not in run.output
    (variant,) = json.loads((tmp_path / "result.json").read_text())["variants"]
    size = variant["size"]
    assert variant["decode"] == {"decided_by": None, "fetch_gbps": 1.0, "layer_us": 0.0}
    for point in variant["points"]:
        loads = point["ungated"]["loads"]
        seconds = (size["read_bytes"] + 24 * size["expert_bytes"]) / 1e10 + loads * size["expert_bytes"] / 1e9
        assert point["ungated"]["tokens_per_second"] == pytest.approx(1 / seconds)


def test_a_precision_beyond_the_limit_of_the_loss(tmp_path):
    """The bundled profile: 8 bits cost 0.01 %, 4 bits 0.12 %."""
    options = [TINY_MIXTRAL, "--profile", PROFILE, "--max-loss-increase", "0.0005", *SPEEDS]
    run = plan(*options, "--precision", "16,8,4", "--result", tmp_path / "result.json")
    assert run.exit_code == 0, run.output
    assert "…" not in run.output
    said = " ".join(run.output.split())
    assert "not gated: precision 4 alone exceeds +0.05%" in said and "0.01% of it by precision 8" in said
    gating = [variant["gating"] for variant in json.loads((tmp_path / "result.json").read_text())["variants"]]
    assert gating[2] is None and gating[0]["threshold"] > gating[1]["threshold"] > 0
    assert "--precision 4 alone increases the loss by 0.12%" in refusal(*options, "--precision", "4")


def test_host_memory_in_a_replay(tmp_path):
    trace = tmp_path / "trace"
    write_trace(trace, 1)
    speeds = []
    for tier in ([], ["--host", "1MiB", "--disk", "0.1"]):
        run = plan(TINY_MIXTRAL, "--trace", trace, *SPEEDS, *tier, "--result", tmp_path / "result.json")
        assert run.exit_code == 0, run.output
        points = json.loads((tmp_path / "result.json").read_text())["variants"][0]["points"]
        speeds.append(points[0]["ungated"]["tokens_per_second"])
    assert speeds[1] < 0.5 * speeds[0]


def test_gating_a_step():
    weights = np.array([[[0.9, 0.1]], [[0.6, 0.4]]], dtype=np.float16)
    step = Step(0.0, ["r"], np.zeros(1, dtype=np.int32), np.zeros((2, 1, 2), dtype=np.int64), weights, {})
    kept = gated(step, [1.0, 1.0], 0.05).weights > 0  # costs of dropping the second: 0.01 and 0.16
    assert kept.tolist() == [[[True, False]], [[True, True]]]


def test_what_cannot_be_planned(tmp_path, mixtral):
    assert "leaves 0 expert slots" in refusal(TINY_MIXTRAL, "--memory", "2MiB", *SPEEDS)
    assert "--memory='24' is not a size" in refusal(TINY_MIXTRAL, "--memory", "24", *SPEEDS)
    assert "--link=fast is not usable" in refusal(TINY_MIXTRAL, "--link", "fast", "--compute", 1)
    assert "--output needs to know the budget" in refusal(TINY_MIXTRAL, *SPEEDS, "-o", tmp_path / "c.json")
    several = [TINY_MIXTRAL, "--memory", "15MiB", "--expert-bits", "8,4", *SPEEDS, "-o", tmp_path / "c.json"]
    assert "--output takes one configuration" in refusal(*several)
    assert "--expert-bits 0 is not usable" in refusal(TINY_MIXTRAL, "--expert-bits", 0, *SPEEDS)
    assert "--dtype int3 is not known" in refusal(TINY_MIXTRAL, "--dtype", "int3", *SPEEDS)
    assert "--allocation half is not known" in refusal(TINY_MIXTRAL, "--allocation", "half", *SPEEDS)
    assert "is for another model" in refusal(mixtral, "--profile", PROFILE, *SPEEDS)
    assert "no profile is given" in refusal(TINY_MIXTRAL, "--max-loss-increase", 0.005, *SPEEDS)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cannot be sized" in refusal(empty, *SPEEDS)
    quantised = MIXTRAL | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (mixtral / "config.json").write_text(json.dumps(quantised))
    assert "set --expert-bits" in refusal(mixtral, *SPEEDS)


def test_speeds_are_measured(tmp_path):
    bandwidth, source = measure_link(1 << 20, tmp_path / "not" / "there")
    assert bandwidth > 0 and source
    assert not list(tmp_path.iterdir())
    assert measure_weights()[0] > 0
