"""Quantised experts: the tokens of stock vLLM with half of the experts resident, packed, restored, in waves and gated.

Without AMX it is the plugin that offers vLLM's x86 kernels for them (`entry/edits.py`), to stock vLLM too.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY
from tiny_quantised import save_quantised_model
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
from vllm.platforms import current_platform

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, hidden_states, prompts
from tests.integration.test_architectures import PROMPT, check_gating
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.compat import runs_quantised_experts
from vllm_adapmoe.integration.layers.expert_tensors import ExpertTensors, own_tensors
from vllm_adapmoe.integration.loading.expert_loading import ExpertLoading
from vllm_adapmoe.integration.measure.engine import Engine

HALF = VLLM_STEPS | {"cache_fraction": 0.5}
EAGER = ENGINE_ARGS | {"enforce_eager": True}
CHECKPOINTS = ("compressed_int8", "compressed_int4", "gptq", "awq", "fp8_blocks", "mxfp4")
ONLINE: dict[str, dict[str, Any]] = {
    "experts_int8": {"quantization": "experts_int8"},
    "fp8_per_block": {"quantization": "online", "quantization_config": {"moe": "fp8_per_block"}},
}
KERNELS = ("compressed_int8", "compressed_int4", "fp8_blocks", "mxfp4")
"""One format of each kernel."""


@pytest.fixture(scope="module")
def kernels():
    if not runs_quantised_experts():
        pytest.skip("vLLM's kernels for quantised experts need AMX, or AVX-512 with VNNI and bf16")


@pytest.fixture(scope="module")
def model(kernels, tiny_model, tmp_path_factory):
    """The folder of a model with experts in a format, and what else `LLM` has to be told."""
    made: dict[str, Path] = {}

    def make(name: str) -> tuple[Path, dict[str, Any]]:
        if name in ONLINE:
            return tiny_model("mixtral"), ONLINE[name]
        if name not in made:
            made[name] = save_quantised_model(name, tmp_path_factory.mktemp(name))
        return made[name], {}

    return make


@pytest.fixture(scope="module")
def stock(model):
    """What stock vLLM answers, and the output of its first MoE block."""
    seen: dict[str, tuple[list[Any], torch.Tensor]] = {}

    def ask(name: str) -> tuple[list[Any], torch.Tensor]:
        if name not in seen:
            folder, args = model(name)
            with Engine(folder, None, **(EAGER | args)) as engine:
                told = answers(engine, prompts(8, VOCABULARY, seed=1), greedy(logprobs=1))
                seen[name] = told, hidden_states(engine, PROMPT)[0]
        return seen[name]

    return ask


@pytest.mark.engine
@pytest.mark.parametrize("name", [*CHECKPOINTS, *ONLINE])
def test_half_of_the_experts(name, model, stock, tmp_path):
    """Packed, then restored on a kernel built for one blank expert; once for each kernel, from host memory too."""
    expected, _ = stock(name)
    folder, args = model(name)
    pack = tmp_path / "experts-0-of-1.pack"
    packed = None
    stores = [{"store": "file", "store_dir": str(tmp_path)}] * 2 + [{"store": "host"}] * (name in KERNELS)
    for number, store in enumerate(stores):
        with Engine(folder, HALF | store, **(EAGER | args)) as engine:
            assert answers(engine, prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)) == expected
            stats = engine.cache_stats()
            assert stats["misses"] > 0 and stats["resident"] <= stats["slots"]
            if number == 0:
                check_gating(engine, 2)
        if packed is not None:
            assert pack.stat().st_mtime_ns == packed, "the second start reads what the first one packed"
        packed = pack.stat().st_mtime_ns


@pytest.mark.engine
@pytest.mark.parametrize("name", KERNELS)
def test_several_waves_are_equal_within_rounding(name, model, stock):
    """With top-k slots for all layers together nearly every step needs several waves."""
    theirs = stock(name)[1].float()
    folder, args = model(name)
    with Engine(folder, VLLM_STEPS | {"cache_experts": 2, "store": "host"}, **(EAGER | args)) as engine:
        ours = hidden_states(engine, PROMPT)[0].float()
        first, again = [], []
        for told in (first, again):  # the second time from another cache content
            engine.llm.reset_prefix_cache()
            told += answers(engine, prompts(8, VOCABULARY, seed=1), greedy(logprobs=1))
    assert torch.allclose(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())
    assert again == first


@pytest.mark.engine
@pytest.mark.parametrize("name", ["compressed_int4", "mxfp4"])
def test_weights_that_are_replaced(name, model, stock, tmp_path):
    """Their loader takes them into shapes that the kernel's format is not in; gpt-oss copies its sinks by itself, and
    stock vLLM 0.32 goes on with the old ones."""
    folder, args = model(name)
    expected, _ = stock(name)
    other = save_quantised_model(name, tmp_path / "other", seed=1)
    asked, params = prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)
    args |= {"enable_prefix_caching": False}  # which does not know of new weights
    with Engine(other, HALF | {"store": "host"}, **(EAGER | args)) as engine:
        assert answers(engine, asked, params) != expected
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        assert answers(engine, asked, params) == expected


@pytest.mark.engine
def test_compiled(model):
    folder, args = model("compressed_int4")
    asked, params = prompts(8, VOCABULARY, seed=1), greedy(logprobs=1)
    with Engine(folder, None, **(ENGINE_ARGS | args)) as engine:
        expected = answers(engine, asked, params)
    with Engine(folder, HALF | {"store": "host"}, **(ENGINE_ARGS | args)) as engine:
        assert answers(engine, asked, params) == expected


@pytest.mark.engine
def test_a_budget_in_bytes_counts_the_quantised_expert(model):
    """Online quantisation loads bf16, and slots hold int8: 2 * 12 slots and not 12 for the bytes of 12 in bf16."""
    folder, args = model("experts_int8")
    budget = {"cache_gb": 12 * 3 * 128 * 128 * 2 / 2**30, "store": "host"}
    with Engine(folder, VLLM_STEPS | budget, **(EAGER | args)) as engine:
        assert 22 <= engine.cache_stats()["slots"] < 24, "24 without scales and the kernel's padding"


@pytest.mark.engine
def test_a_budget_below_one_token_is_refused(model):
    """By what vLLM has built, before a weight is read: a configuration does not tell what an expert takes."""
    folder, args = model("gptq")
    budget = {"cache_gb": 1.5 * 3 * 128 * 128 * 4 / 8 / 2**30}
    with pytest.raises(AdapMoEError, match=r"gives 1 expert slots .* but a token needs 2"):
        Engine(folder, budget, **(EAGER | args)).close()


@pytest.mark.engine
def test_zentorch_is_refused_while_it_remembers_weights(tiny_model, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_zen_cpu", lambda self: True)
    args = EngineArgs(model=str(tiny_model("mixtral")), moe_method="adapmoe", adapmoe_config={"cache_fraction": 0.5})
    with pytest.raises(AdapMoEError, match="ZENDNNL_MATMUL_WEIGHT_CACHE=0"):
        args.create_engine_config()
    monkeypatch.setenv("ZENDNNL_MATMUL_WEIGHT_CACHE", "0")
    args.create_engine_config()


def test_what_experts_share_is_refused_in_a_pack():
    loading = object.__new__(ExpertLoading)
    layer: Any = SimpleNamespace(quant_method=object())
    loading.config = AdapMoEConfig(cache_fraction=0.5, store="file")
    loading.check_shared(layer, [])
    with pytest.raises(AdapMoEError, match=r"does not hold w13_input_scale.*set store='host'"):
        loading.check_shared(layer, ["w13_input_scale"])
    loading.config = AdapMoEConfig(cache_fraction=0.5, store="host")
    loading.check_shared(layer, ["w13_input_scale"])


class ScalesOfItsOwn:
    """A kernel as some of vLLM's are: it keeps a view of one scale, and a converted copy of another."""

    __module__ = "vllm.stand_in"

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config
        self.view = quant_config.w1_scale.detach().reshape(4, -1)
        self.copy = quant_config.w2_scale.detach().double()


def test_kernels_read_slots_through_tensors_of_their_own():
    layer = torch.nn.Module()
    for name, shape in {"w13_weight": (4, 6, 3), "w13_scale": (4, 6, 1), "w2_scale": (4, 3, 1), "bias": (4,)}.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.rand(shape), requires_grad=False))
    layer.quant_method = type("Method", (), {"__module__": "vllm.stand_in"})()
    foreign = {id(layer.bias)}
    kernel = ScalesOfItsOwn(int8_w8a8_moe_quant_config(layer.w13_scale, layer.w2_scale, None, None))
    layer.quant_method.moe_kernel = kernel
    held = {path: tensor for path, tensor in own_tensors(layer).items() if id(tensor) not in foreign}
    experts = ExpertTensors.of(held, [path for path, tensor in held.items() if len(tensor) == 4])
    assert list(experts.tensors) == ["w13_weight", "w13_scale", "w2_scale", "quant_method.moe_kernel.copy"]
    slots = {name: torch.rand(2, *tensor.shape[1:], dtype=tensor.dtype) for name, tensor in experts.tensors.items()}
    experts.free()
    experts.replace(slots)
    assert torch.equal(kernel.quant_config.w1_scale, slots["w13_scale"])
    assert torch.equal(kernel.view, slots["w13_scale"].view(2, -1))
    assert torch.equal(kernel.copy, slots["quant_method.moe_kernel.copy"])
    assert layer.bias.shape == (4,)
