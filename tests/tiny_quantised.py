"""Tiny Mixtral checkpoints with quantised experts, in the formats that others write."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

Tensors = dict[str, torch.Tensor]
BLOCK = 128
GROUP = 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's place of each of eight values in an int32."""


def _int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _fp8_blocks(weight: torch.Tensor) -> Tensors:
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    weight = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values 0 to 15 around 8, `[rows, columns]`, and scales `[rows, groups]`."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() + 8).flatten(1).to(torch.int64), scale.squeeze(2).to(torch.bfloat16)


def _pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values of four bits to an int32, along the last dimension."""
    shifts = torch.tensor([4 * order.index(place) for place in range(8)])
    return (values.unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def _compressed_int4(weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    return {
        "weight_packed": _pack(values), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)
    }  # fmt: skip


def _gptq(weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    zeros = torch.full_like(scale.t(), 7).to(torch.int64)  # GPTQ stores zero points less one
    return {
        "qweight": _pack(values).t().contiguous(),
        "qzeros": _pack(zeros),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def _awq(weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    zeros = torch.full_like(scale.t(), 8).to(torch.int64)
    return {
        "qweight": _pack(values.t(), AWQ_ORDER), "qzeros": _pack(zeros, AWQ_ORDER), "scales": scale.t().contiguous()
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
    "fp8_blocks": (_fp8_blocks, {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "ignored_layers": [],
    }),
    "gptq": (_gptq, {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False,
        "dynamic": {r"-:.*self_attn.*": {}},
    }),
    "awq": (_awq, {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": _OTHERS,
    }),
}  # fmt: skip
"""How each format stores a weight `[rows, columns]`, and what it says of itself in `config.json`."""


def save_quantised_model(name: str, folder: Path) -> Path:
    """Writes a random Mixtral whose experts are in the format `name` into `folder`, and returns the folder."""
    quantise, config = FORMATS[name]
    save_tiny_model("mixtral", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(_quantised(tensors, quantise)), folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return folder


def _quantised(tensors: Tensors, quantise: Callable[[torch.Tensor], Tensors]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if ".experts." not in name:
            yield name, tensor
            continue
        for suffix, part in quantise(tensor.float()).items():
            yield f"{name.removesuffix('.weight')}.{suffix}", part.contiguous()
