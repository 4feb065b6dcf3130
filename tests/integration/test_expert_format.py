"""Formats of experts by quantisation settings that the backend matrix has no checkpoint for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adapmoe.integration.entry.backends import (
    BLOCK_CODECS,
    FP8,
    INT_WEIGHTS,
    MOE_WNA16,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    UNQUANTISED,
    W4A8,
)
from vllm_adapmoe.integration.entry.expert_format import expert_formats


def settings(name: str, **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(get_name=lambda: name, **attributes)


def quark(weight: Any, inputs: Any = None, layers: Any = None) -> SimpleNamespace:
    scheme = {"weight": weight, "input_tensors": inputs}
    return settings("quark", quant_config={"global_quant_config": scheme, "layer_quant_config": layers or {}})


def mixed(*algorithms: str) -> SimpleNamespace:
    layers = {f"model.layers.{n}.mlp.experts": {"quant_algo": name} for n, name in enumerate(algorithms)}
    return settings("modelopt_mixed", quantized_layers=layers | {"lm_head": {"quant_algo": "MXFP8"}})


@pytest.mark.parametrize(
    ("quantisation", "formats"),
    [
        (None, {UNQUANTISED}),
        (settings("torchao"), {UNQUANTISED}),
        (settings("somebodys_own"), None),
        (settings("fp8", store_dtype="mxfp4"), {MXFP4}),
        (settings("deepseek_v4_fp8", expert_dtype="fp4", moe_quant_algo=""), {MXFP4}),
        (settings("deepseek_v4_fp8", expert_dtype="fp4", moe_quant_algo="NVFP4"), {NVFP4}),
        (settings("deepseek_v4_fp8", expert_dtype="fp8"), {FP8}),
        (mixed("NVFP4", "FP8"), {NVFP4, FP8}),
        (mixed("W4A16_NVFP4"), {NVFP4}),
        (mixed("NVFP4", "OWN_CODEC"), {NVFP4, BLOCK_CODECS}),
        (mixed(), None),
        (quark({"dtype": "fp8_e4m3"}, {"dtype": "fp8_e4m3"}), {FP8}),
        (quark({"dtype": "fp6_e3m2"}), {MXFP6}),
        (quark([{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]), {W4A8}),
        (quark({"dtype": "int4"}, None, {"*.experts.*": {"weight": {"dtype": "fp4"}}}), {MXFP4}),
        (settings("inc", data_type="mx_fp8e4m3", weight_bits=8), {MXFP8}),
        (settings("inc", data_type="fp", weight_bits=8), {FP8}),
        (settings("online", args=SimpleNamespace(moe=None, targets=None)), {UNQUANTISED}),
        (settings("online", args=SimpleNamespace(moe=None, targets={"*.experts": "mxfp8", "q_proj": "fp8"})), {MXFP8}),
    ],
)
def test_formats(quantisation, formats):
    assert expert_formats(quantisation, (2048, 768), 1) == formats


@pytest.mark.parametrize(
    ("group", "sizes", "ranks", "formats"),
    [
        (128, (2048, 768), 1, {INT_WEIGHTS}),
        (128, (2048, 768), 4, {MOE_WNA16}),  # 192 of each rank are not whole groups
        (-1, (2048, 768), 4, {INT_WEIGHTS}),
        (256, (2048, 768), 1, {MOE_WNA16}),
        (128, (2000, 768), 1, {MOE_WNA16}),
        (128, None, 1, {INT_WEIGHTS}),
    ],
)
def test_weights_that_marlin_has_no_tiles_for(group, sizes, ranks, formats):
    assert expert_formats(settings("auto_gptq", group_size=group), sizes, ranks) == formats


def test_a_model_that_does_not_tell_its_sizes_is_served_all_the_same():
    assert expert_formats(None, None, 1) == {UNQUANTISED}


def test_keys_of_weights_quantised_while_loading():
    key = SimpleNamespace(dtype=torch.uint8, scale=SimpleNamespace(dtype=torch.float8_e4m3fn), scale2=object())
    args = SimpleNamespace(moe=SimpleNamespace(weight=key), targets=None)
    assert expert_formats(settings("online", args=args), None, 1) == {NVFP4}
