"""The key of vLLM's compile cache tells a model that is resident as a whole from the same one offloaded."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_MIXTRAL
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.engine.arg_utils import EngineArgs

from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.worker.compile_key import record_traced_layers


@pytest.fixture(scope="module")
def config() -> Any:
    """What a worker is given; budget and memory are the same whatever fits."""
    return EngineArgs(
        model=str(TINY_MIXTRAL), skip_tokenizer_init=True, max_model_len=128, moe_method="adapmoe",
        adapmoe_config={"cache_gb": "auto"},
    ).create_engine_config()  # fmt: skip


def layers(**attributes: Any) -> list[Any]:
    state = dict.fromkeys(("expert_map", "cache", "gating", "probe", "predictor")) | attributes
    stock = CachedExperts.is_stock.fget  # type: ignore[attr-defined]
    gates = attributes.get("gating") == "token"
    return [SimpleNamespace(is_stock=stock(SimpleNamespace(**state)), gates_in_model=gates) for _ in range(3)]


def key(config: Any, *what: Any) -> list[str]:
    record_traced_layers(config, torch.nn.Sequential(), *what)
    return aot_compile_hash_factors(config)


def test_the_key_knows_what_is_traced(config):
    resident = key(config, layers(), False)
    assert resident == key(config, layers(), False), "the same is not found again"
    for attribute in ("expert_map", "cache", "gating", "probe", "predictor"):
        assert key(config, layers(**{attribute: object()}), False) != resident, attribute
    assert key(config, layers(), True) != resident
    assert key(config, layers(gating="token"), False) != key(config, layers(gating="batch"), False)


def test_a_layers_own_code_runs_where_any_of_them_is_set():
    assert [layer.is_stock for layer in layers()] == [True] * 3
    assert not layers(cache=object())[0].is_stock


def test_a_part_that_was_built_with_a_copy_of_the_configuration_knows_it(config):
    """As the language model in a multimodal one is: `with_hf_config` of `vllm/config/vllm.py` copies the dict, too."""
    copied = dataclasses.replace(config)
    assert copied.additional_config is not config.additional_config
    model = torch.nn.Sequential(torch.nn.Sequential())
    model[0].vllm_config = copied
    record_traced_layers(config, model, layers(), False)
    before = aot_compile_hash_factors(copied)
    record_traced_layers(config, model, layers(cache=object()), False)
    assert aot_compile_hash_factors(copied) != before
    assert copied.additional_config == config.additional_config
