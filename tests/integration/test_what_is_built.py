"""Models whose configuration does not tell what vLLM builds: what counts is what it has built."""

import pytest
import torch
from tiny_models import COMMON
from transformers import AfmoeConfig, AutoModelForCausalLM, DbrxConfig, JetMoeConfig
from vllm.distributed.parallel_state import destroy_model_parallel

from tests.integration.scenarios import ENGINE_ARGS, answers, greedy, prompts
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.measure.engine import Engine, describe_model
from vllm_adapmoe.profile.model_profile import LayerProfile, ModelProfile

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True}
CONFIGS = {
    # The first layers are dense: transformers says `num_dense_layers`.
    "afmoe": AfmoeConfig(
        **COMMON | {"num_hidden_layers": 4}, intermediate_size=256, moe_intermediate_size=64, num_experts=8,
        num_experts_per_tok=2, num_shared_experts=1, num_dense_layers=2, head_dim=32, sliding_window=64,
        global_attn_every_n_layers=2, score_func="sigmoid", route_norm=True, n_group=1, topk_group=1,
    ),
    # The experts are in a configuration of their own.
    "dbrx": DbrxConfig(
        d_model=128, n_heads=4, n_layers=2, max_seq_len=512, vocab_size=COMMON["vocab_size"],
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 128},
    ),
    # vLLM runs it as transformers does, without a fused layer.
    "jetmoe": JetMoeConfig(
        **COMMON | {"num_key_value_heads": 2}, intermediate_size=64, kv_channels=32, num_local_experts=4,
        num_experts_per_tok=2,
    ),
}  # fmt: skip
LAYERS, EXPERTS, TOP_K = 2, 8, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    def make(name):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
        for place, parameter in made.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15 if "embed" not in place else 1.0)
        folder = tmp_path_factory.mktemp(name)
        made.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def groups():
    """VLLM makes no group of expert-parallel ranks for DBRX, and keeps its groups for the next engine of a process."""
    yield
    destroy_model_parallel()


def refusal(folder, config, **args) -> str:
    with pytest.raises(AdapMoEError) as error:
        Engine(folder, config, **ARGS, **args).close()
    assert "\n" not in str(error.value)
    return str(error.value)


def write_profile(folder, path, layers: int):
    info = describe_model(folder)
    assert info.num_layers == 0, "only the built model tells"
    known = info.model_copy(update={"num_layers": layers, "num_experts": EXPERTS, "top_k": TOP_K})
    profile = ModelProfile(
        method="published", source="test", model=known, layers=[LayerProfile(sensitivity=1)] * layers
    )
    profile.save(path)
    return {"profile": str(path), "gating": {"mode": "token", "threshold": 0.0}, "cache_fraction": 0.5}


def test_a_profile_is_compared_with_the_layers_that_are_built(model, tmp_path):
    folder = model("afmoe")
    told = refusal(folder, write_profile(folder, tmp_path / "four.json", 4))
    assert "is for another model" in told and "num_layers is 4, this model's is 2" in told
    with Engine(folder, write_profile(folder, tmp_path / "two.json", LAYERS), **ARGS) as engine:
        answers(engine, prompts(2, COMMON["vocab_size"], seed=1), greedy())
        assert engine.cache_stats()["misses"] > 0


def test_experts_in_a_configuration_of_their_own(model):
    """Without weights: vLLM 0.30 to 0.33 look for DBRX's under names that they do not have."""
    folder = model("dbrx")
    with Engine(folder, {"cache_fraction": 0.5}, load_format="dummy", **ARGS) as engine:
        answers(engine, prompts(2, COMMON["vocab_size"], seed=1), greedy())
        assert engine.cache_stats()["misses"] > 0
        assert engine.call("experts_built") == {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    assert "cache_experts=17 is more than the 16 routed experts" in refusal(
        folder, {"cache_experts": 17}, load_format="dummy"
    )


def test_a_model_without_fused_experts_is_refused(model, tmp_path):
    told = refusal(model("jetmoe"), {"cache_fraction": 0.5})
    assert "has no routed experts that vLLM runs in its fused layer; remove moe_method" in told


def test_a_quantisation_without_a_kernel_is_refused(tiny_model):
    """Stock vLLM ends in its own error, after it has read the weights."""
    with pytest.raises(AdapMoEError, match="quantization='fp8': vLLM has no kernel for its experts on this cpu"):
        Engine(tiny_model("mixtral"), {"cache_fraction": 0.5}, quantization="fp8", **ARGS).close()
