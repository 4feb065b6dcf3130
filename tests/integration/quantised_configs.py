"""What checkpoints of every expert format say of themselves, and what a user adds to have one made while loading."""

from typing import Any

Settings = dict[str, Any]
GROUP = 128


def _compressed(fmt: str, weights: Settings, activations: Settings | None) -> Settings:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head", r"re:.*self_attn.*", r"re:.*gate$"],
    }  # fmt: skip


def _number(bits: int, kind: str, strategy: str, dynamic: bool | str = False, **more: Any) -> Settings:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic} | more


def _gptq(bits: int, act_order: bool) -> Settings:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order, "sym": True, "lm_head": False
    }  # fmt: skip


def _modelopt(algorithm: str, **more: Any) -> Settings:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_quant_algo": None, "ignore": []} | more


def _awq(group_size: int) -> Settings:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def _quark(weight: Settings, inputs: Settings | None) -> Settings:
    layer = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark", "export": {"kv_cache_group": [], "pack_method": "reorder"}, "exclude": [],
        "global_quant_config": layer, "layer_quant_config": {}, "layer_type_quant_config": {},
    }  # fmt: skip


def _quark_mxfp4(dynamic: bool) -> Settings:
    return {
        "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": dynamic,
        "ch_axis": -1, "symmetric": None,
    }  # fmt: skip


_TOKENS_FP8 = _number(8, "float", "token", True)
_NVFP4 = _number(4, "float", "tensor_group", group_size=16)
_MXFP4 = _number(4, "float", "group", group_size=32, scale_dtype="torch.uint8")

CHECKPOINTS: dict[str, Settings | None] = {
    "bf16": None,
    "FP8, blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "FP8, tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "FP8, tensor, static": {"quant_method": "fp8", "activation_scheme": "static"},
    "FP8, channel (compressed-tensors)":
        _compressed("float-quantized", _number(8, "float", "channel"), _TOKENS_FP8),
    "FP8, tensor (compressed-tensors)":
        _compressed("float-quantized", _number(8, "float", "tensor"), _number(8, "float", "tensor")),
    "FP8, blocks (compressed-tensors)": _compressed(
        "float-quantized", _number(8, "float", "block", block_structure=[128, 128]),
        _number(8, "float", "group", True, group_size=128),
    ),
    "FP8 (ModelOpt)": _modelopt("FP8"),
    "AWQ": _awq(GROUP),
    "AWQ, groups of 256": _awq(256),
    "GPTQ, 4 bit": _gptq(4, False),
    "GPTQ, 4 bit, act-order": _gptq(4, True),
    "GPTQ, 8 bit": _gptq(8, False),
    "W4A16 (compressed-tensors)":
        _compressed("pack-quantized", _number(4, "int", "group", group_size=GROUP), None),
    "W4A16, groups of 32 (compressed-tensors)":
        _compressed("pack-quantized", _number(4, "int", "group", group_size=32), None),
    "W4A16, asymmetric (compressed-tensors)":
        _compressed("pack-quantized", _number(4, "int", "group", group_size=GROUP) | {"symmetric": False}, None),
    "W8A16 (compressed-tensors)": _compressed("pack-quantized", _number(8, "int", "channel"), None),
    "AutoRound, 4 bit": {
        "quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
    },
    "W8A8, int8 (compressed-tensors)":
        _compressed("int-quantized", _number(8, "int", "channel"), _number(8, "int", "token", True)),
    "W4A8, FP8 (compressed-tensors)":
        _compressed("pack-quantized", _number(4, "int", "group", group_size=128), _TOKENS_FP8),
    "MXFP4 (gpt-oss)": {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]},
    "MXFP4 (compressed-tensors)": _compressed("mxfp4-pack-quantized", _MXFP4, None),
    "MXFP4 (Quark)": _quark(_quark_mxfp4(False), None),
    "MXFP4, W4A4 (Quark)": _quark(_quark_mxfp4(False), _quark_mxfp4(True)),
    "MXFP8 (ModelOpt)": _modelopt("MXFP8"),
    "NVFP4 (compressed-tensors)":
        _compressed("nvfp4-pack-quantized", _NVFP4, _NVFP4 | {"dynamic": "local"}),
    "NVFP4A16 (compressed-tensors)": _compressed("nvfp4-pack-quantized", _NVFP4, None),
    "NVFP4 (ModelOpt)": _modelopt("NVFP4", group_size=16),
    "FP8 and NVFP4 (ModelOpt)": _modelopt("MIXED_PRECISION", quantized_layers={
        "model.layers.0.mlp.experts.0.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.experts.0.gate_proj": {"quant_algo": "FP8"},
    }),
}  # fmt: skip
"""`quantization_config` of `config.json`, by a name for the format; None: nothing is quantised."""

ONLINE: dict[str, Settings] = {
    "FP8 while loading": {"quantization": "fp8"},
    "FP8, blocks, while loading": {"quantization": "fp8_per_block"},
    "FP8, channel, while loading": {"quantization": "fp8_per_channel"},
    "int8 while loading": {"quantization": "experts_int8"},
    "MXFP4 while loading": {"quantization": "mxfp4"},
    "MXFP8 while loading": {"quantization": "mxfp8"},
    "NVFP4 while loading": {"quantization": "nvfp4_per_token"},
}
"""Engine arguments, beside a checkpoint in bf16."""
OVERRIDDEN: dict[str, tuple[str, Settings]] = {"GPTQ, as moe_wna16": ("GPTQ, 4 bit", {"quantization": "moe_wna16"})}
"""A checkpoint by name, and engine arguments that read it in another way."""
