"""Tiny checkpoints with quantised experts, in the formats that others write: Mixtral, and gpt-oss in its own MXFP4."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, save_tiny_model
from transformers import AutoModelForCausalLM, GptOssConfig

from benchmarks.gpu_check.checkpoints import GROUP, fp8_blocks, fp8_config, gptq, gptq_config, int4, pack
from vllm_adapmoe.precision.rounding import round_to_int4

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's place of each of eight values in an int32."""


def _int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _compressed_int4(weight: torch.Tensor) -> Tensors:
    values, scale = int4(weight)
    return {
        "weight_packed": pack(values), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)
    }  # fmt: skip


def _rounded_int4(weight: torch.Tensor) -> Tensors:
    """As `precision=4` rounds, packed by other code."""
    rounded = round_to_int4(weight, GROUP, torch.bfloat16)
    return {
        "weight_packed": pack(rounded.integers.to(torch.int64) + 8), "weight_scale": rounded.scales,
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


def _awq(weight: torch.Tensor) -> Tensors:
    values, scale = int4(weight)
    zeros = torch.full_like(scale.t(), 8).to(torch.int64)
    return {
        "qweight": pack(values.t(), AWQ_ORDER), "qzeros": pack(zeros, AWQ_ORDER), "scales": scale.t().contiguous()
    }  # fmt: skip


def _compressed(fmt: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*self_attn.*", r"re:.*gate$"],
        "quantization_status": "compressed",
    }


_SYMMETRIC = {"type": "int", "symmetric": True}
_OTHERS = ["self_attn", "gate", "lm_head"]

FORMATS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "compressed_int8": (_int8, _compressed(
        "int-quantized",
        _SYMMETRIC | {"num_bits": 8, "strategy": "channel", "dynamic": False},
        _SYMMETRIC | {"num_bits": 8, "strategy": "token", "dynamic": True},
    )),
    "compressed_int4": (_compressed_int4, _compressed(
        "pack-quantized", _SYMMETRIC | {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False}, None
    )),
    "rounded_int4": (_rounded_int4, _compressed(
        "pack-quantized", _SYMMETRIC | {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False}, None
    )),
    "fp8_blocks": (fp8_blocks, fp8_config(
        [f"model.layers.{n}.self_attn.{proj}_proj" for n in range(3) for proj in "qkvo"]
    )),
    "gptq": (gptq, gptq_config()),
    "awq": (_awq, {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": _OTHERS,
    }),
}  # fmt: skip
"""How each format stores a weight `[rows, columns]`, and what it says of itself in `config.json`."""


def save_quantised_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes a random model whose experts are in the format `name` into `folder`, and returns the folder."""
    if name == "mxfp4":
        _save_gpt_oss(folder, seed)
        return folder
    quantise, config = FORMATS[name]
    save_tiny_model("mixtral", folder, seed)
    _rewrite(folder, config, lambda tensor_name, tensor: _quantised(tensor_name, tensor, quantise))
    return folder


def _rewrite(
    folder: Path, config: dict[str, Any], convert: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    converted = {name: part.contiguous() for item in tensors.items() for name, part in convert(*item)}
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))


def _quantised(
    name: str, tensor: torch.Tensor, quantise: Callable[[torch.Tensor], Tensors]
) -> Iterator[tuple[str, torch.Tensor]]:
    if ".experts." not in name:
        yield name, tensor
        return
    for suffix, part in quantise(tensor.float()).items():
        yield f"{name.removesuffix('.weight')}.{suffix}", part


def _save_gpt_oss(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = GptOssConfig(
        **COMMON, intermediate_size=128, head_dim=32, num_local_experts=8, num_experts_per_tok=2, sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    _rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": _OTHERS}, _mxfp4)


def _mxfp4(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Random codes, two to a byte, and exponents, for blocks of 32 along the input dimension."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        yield name, tensor
        return
    experts, columns, rows = tensor.shape
    yield f"{name}_blocks", torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    yield f"{name}_scales", torch.randint(120, 124, (experts, rows, columns // 32), dtype=torch.uint8)
