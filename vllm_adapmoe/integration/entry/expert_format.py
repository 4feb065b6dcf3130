"""Determines the format of a model's routed experts from its quantisation settings, before any layer exists.

Uses the names and attributes of vLLM's quantisation configurations in 0.30 to 0.33 (`layers/quantization/`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vllm_adapmoe.integration.entry.backends import (
    BLOCK_CODECS,
    FP8,
    FP8_CHANNELS_ONLINE,
    HUMMING,
    INT8,
    INT_WEIGHTS,
    MOE_WNA16,
    MXFP4,
    MXFP4_COMPRESSED,
    MXFP4_W4A4,
    MXFP6,
    MXFP8,
    NVFP4,
    UNQUANTISED,
    W4A8,
)

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Group sizes that Marlin supports; -1: one scale per channel."""
MARLIN_HIDDEN = 128
"""Marlin requires a hidden size that is a multiple of this (`check_moe_marlin_supports_config`)."""


def expert_formats(quantisation: Any, sizes: tuple[int, int] | None, ranks: int) -> set[str] | None:
    """Returns the formats of the routed experts, keys of `backends.FORMATS`; None if unknown.

    Args:
        quantisation: vLLM's `QuantizationConfig`, or None.
        sizes: hidden and intermediate size of an expert; None if the model's configuration does not have them.
        ranks: number of ranks that the intermediate size is sharded over.
    """
    if quantisation is None:
        return {UNQUANTISED}
    name = str(quantisation.get_name())
    formats = FIXED[name] if name in FIXED else READERS[name](quantisation) if name in READERS else None
    if formats is None or None in formats:
        return None
    kinds = {str(kind) for kind in formats}
    if INT_WEIGHTS in kinds and sizes is not None and not _fits_marlin(quantisation, sizes[0], sizes[1] // ranks):
        # vLLM then reads AWQ and GPTQ as `moe_wna16`, and others with Triton.
        kinds = kinds - {INT_WEIGHTS} | {MOE_WNA16}
    return kinds


def _fits_marlin(quantisation: Any, hidden: int, inner: int) -> bool:
    groups = [getattr(quantisation, "group_size", None)]
    for scheme in getattr(quantisation, "target_scheme_map", {}).values():
        groups.append(getattr(scheme.get("weights"), "group_size", None))
    return hidden % MARLIN_HIDDEN == 0 and all(
        group is None or (group in MARLIN_GROUPS and (group < 0 or inner % group == 0)) for group in groups
    )


FIXED: dict[str, set[str]] = {
    **{name: {INT_WEIGHTS} for name in ("auto_awq", "awq", "awq_marlin", "auto_gptq", "gptq", "gptq_marlin")},
    "moe_wna16": {MOE_WNA16},
    "experts_int8": {INT8},
    **{name: {MXFP4} for name in ("mxfp4", "gpt_oss_mxfp4")},
    "modelopt": {FP8},
    "modelopt_fp4": {NVFP4},
    "modelopt_mxfp8": {MXFP8},
    "humming": {HUMMING},
    **{name: {UNQUANTISED} for name in ("fbgemm_fp8", "fp_quant", "torchao")},  # these quantise linear layers only
}
"""Formats by quantisation name, where the name alone determines them."""


def _fp8(quantisation: Any) -> Iterable[str | None]:
    return {MXFP4 if getattr(quantisation, "store_dtype", None) == "mxfp4" else FP8}


def _deepseek_v4(quantisation: Any) -> Iterable[str | None]:
    if quantisation.expert_dtype != "fp4":
        return {FP8}
    return {NVFP4 if "NVFP4" in getattr(quantisation, "moe_quant_algo", "") else MXFP4}


MODELOPT = {
    "FP8": FP8, "FP8_PB_WO": FP8, "FP8_BLOCK_SCALES": FP8, "FP8_PER_CHANNEL_PER_TOKEN": FP8, "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4, "MXFP8": MXFP8,
}  # fmt: skip


def _modelopt_mixed(quantisation: Any) -> Iterable[str | None]:
    layers: Mapping[str, Any] = quantisation.quantized_layers
    names = {str(layer["quant_algo"]).upper() for name, layer in layers.items() if "expert" in name or "moe" in name}
    return {MODELOPT.get(name, BLOCK_CODECS) for name in names} or None  # type: ignore[return-value]


def _compressed(quantisation: Any) -> Iterable[str | None]:
    """Reads compressed-tensors schemes: those whose target names experts, else all."""
    schemes: Mapping[str, Any] = quantisation.target_scheme_map
    named = {target: scheme for target, scheme in schemes.items() if "expert" in target.lower()}
    return {_scheme(scheme["weights"], scheme.get("input_activations")) for scheme in (named or schemes).values()}


def _scheme(weights: Any, inputs: Any) -> str | None:
    if weights is None:
        return UNQUANTISED
    kind, bits = str(getattr(weights.type, "value", weights.type)), weights.num_bits
    if kind == "float":
        if bits == 4:
            if weights.group_size != 32:
                return NVFP4
            return MXFP4_COMPRESSED if inputs is None or inputs.num_bits == 4 else MXFP4
        return MXFP8 if weights.group_size == 32 else FP8
    if inputs is None:
        return INT_WEIGHTS
    return INT8 if bits == 8 else W4A8


def _quark(quantisation: Any) -> Iterable[str | None]:
    """Reads Quark schemes: those of layers whose name contains experts, else the model's global one."""
    config: Mapping[str, Any] = quantisation.quant_config
    layers: Mapping[str, Any] = config.get("layer_quant_config") or {}
    named = [scheme for name, scheme in layers.items() if "expert" in name]
    return {_quark_scheme(scheme.get("weight"), scheme.get("input_tensors")) for scheme in named or _global(config)}


def _global(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config.get("global_quant_config") or {}]


def _quark_scheme(weight: Any, inputs: Any) -> str | None:
    if isinstance(weight, list) and len(weight) > 1:  # two levels: 4 bit in 8 bit, or group scales under a tensor scale
        return NVFP4 if any(str(part.get("dtype")).startswith("fp4") for part in weight) else W4A8
    weight = weight[0] if isinstance(weight, list) else weight
    dtype = "" if weight is None else str(weight.get("dtype"))
    if dtype == "int8":
        return INT8
    if dtype == "fp4":
        inputs = inputs[0] if isinstance(inputs, list) else inputs
        return MXFP4_W4A4 if inputs is not None and inputs.get("dtype") == "fp4" else MXFP4
    kinds = {"": UNQUANTISED, "fp8": FP8, "int4": INT_WEIGHTS, "uint4": INT_WEIGHTS, "fp6": MXFP6}
    return next((kind for start, kind in kinds.items() if start and dtype.startswith(start)), kinds.get(dtype))


def _inc(quantisation: Any) -> Iterable[str | None]:
    kind = str(quantisation.data_type)
    if "mx_fp" in kind:
        return {MXFP8 if quantisation.weight_bits == 8 else MXFP4}
    return {INT_WEIGHTS if kind == "int" else FP8}


def _online(quantisation: Any) -> Iterable[str | None]:
    """Reads online quantisation: one key for all experts, or shorthands by layer."""
    args = quantisation.args
    if args.moe is not None:
        return {_key(args.moe.weight)}
    if args.targets is None:
        return {UNQUANTISED}
    kinds = {
        "fp8_per_channel": FP8_CHANNELS_ONLINE, "fp8": FP8, "mxfp8": MXFP8, "mxfp4": MXFP4_W4A4, "nvfp4": NVFP4,
        "int8": INT8,
    }  # fmt: skip
    names = {name for target, name in args.targets.items() if "expert" in target} or set(args.targets.values())
    return {next((kind for start, kind in kinds.items() if name.startswith(start)), None) for name in names}


def _key(weight: Any) -> str | None:
    if weight.dtype == torch.float8_e4m3fn:
        if weight.scale.dtype == torch.uint8:
            return MXFP8
        return FP8_CHANNELS_ONLINE if weight.scale.group_shape.is_per_channel() else FP8
    if weight.dtype == torch.uint8:
        return MXFP4_W4A4 if weight.scale2 is None else NVFP4
    return INT8 if weight.dtype == torch.int8 or "8" in str(weight.dtype) else None


READERS: dict[str, Callable[[Any], Iterable[str | None] | None]] = {
    "fp8": _fp8,
    "deepseek_v4_fp8": _deepseek_v4,
    "modelopt_mixed": _modelopt_mixed,
    "compressed-tensors": _compressed,
    "quark": _quark,
    "inc": _inc,
    "online": _online,
}
"""Functions by quantisation name that read the formats from the configuration."""
