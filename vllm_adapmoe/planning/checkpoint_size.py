"""Measures a model's sizes from its configuration alone: it is built without memory for its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import model_name
from vllm_adapmoe.planning.memory_plan import ModelSize, StepSize
from vllm_adapmoe.precision.formats import GROUPS, bits_per_weight
from vllm_adapmoe.printable import reason
from vllm_adapmoe.profile.model_profile import ModelInfo
from vllm_adapmoe.store.record import align

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""Names of top-k in model configurations: those vLLM knows (`ModelArchConfigConvertorBase`), and Ernie's."""


def has_weights(folder: Path) -> bool:
    """Returns whether a folder contains weight files."""
    return any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES)


def measure_checkpoint(
    folder: Path,
    dtype: torch.dtype | None,
    expert_bits: float | None,
    precision: int | None = None,
    on_cpu: bool = False,
    ranks: int = 1,
) -> tuple[ModelInfo, ModelSize]:
    """Measures a model; for a multimodal one, experts of the text part, and all other weights together.

    Args:
        folder: folder with `config.json`; no weights are needed.
        dtype: dtype of the weights; None: the dtype in the configuration.
        expert_bits: bits per weight of a routed expert, scales included; None: those of `precision`.
        precision: 8 or 4 if experts are quantised while they load; None or 16: they keep `dtype`.
        on_cpu: whether quantised experts have the format of vLLM's x86 kernels.
        ranks: tensor-parallel ranks, each of which has a part of every expert.

    Returns:
        The model as a profile describes it, without a hash, and its sizes, of experts for one rank.

    Raises:
        AdapMoEError: no configuration; transformers cannot build it; it is quantised and `expert_bits` is None; it
            has no routed experts, or experts of several sizes; or no kernel takes them at `precision`.
    """
    model, config = _build(folder)
    text = config.get_text_config()
    dtype = dtype or _dtype(config)
    if expert_bits is None and any(getattr(part, "quantization_config", None) is not None for part in (config, text)):
        remedy = "set" if precision is None else "remove --precision and set"
        raise AdapMoEError(f"{folder} is quantised; {remedy} --expert-bits to the bits per expert weight")
    layers = list(_expert_layers(model))
    top_k = _find(text.to_dict(), TOP_K) or 0
    if not layers or not top_k:
        raise AdapMoEError(f"{folder} has no routed experts; take a mixture-of-experts model")
    if len({(count, weights) for count, weights, _ in layers}) > 1:
        raise AdapMoEError(f"{folder} has experts of several sizes; adapmoe plan supports models with one size")
    count, expert_weights, _ = layers[0]
    bits = expert_bits or 8.0 * dtype.itemsize
    if precision in (8, 4):
        inner, rest = divmod(expert_weights, 3 * text.hidden_size)
        if rest:
            raise AdapMoEError(
                f"--precision {precision} is planned for experts of three matrices without biases; set --expert-bits"
            )
        inner //= ranks
        quantised = bits_per_weight(precision, text.hidden_size, inner, on_cpu)
        if quantised is None:
            raise AdapMoEError(
                f"--precision {precision} does not work with experts of {text.hidden_size} by {inner} weights, which "
                f"are not multiples of {GROUPS[-1]}; use 8"
            )
        bits = quantised
    other = sum(parameter.numel() for parameter in model.parameters()) - sum(weights for *_, weights in layers)
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    read = other if output is None or output.weight is embedding else other - embedding.numel()
    info = ModelInfo(
        name=model_name(folder.resolve()),
        architecture=(config.architectures or [type(model).__name__])[0],
        hidden_size=text.hidden_size,
        num_layers=len(layers),
        num_experts=count,
        top_k=top_k,
    )
    size = ModelSize(
        num_layers=len(layers),
        num_experts=count,
        top_k=top_k,
        expert_bytes=align(round(expert_weights // ranks * bits / 8)),
        other_bytes=other * dtype.itemsize,
        read_bytes=read * dtype.itemsize,
        all_layers=text.num_hidden_layers,
    )
    return info, size


def measure_step(folder: Path, dtype: torch.dtype | None, max_model_len: int | None) -> StepSize:
    """Measures the sizes that the memory of a step depends on.

    Args:
        folder: folder with `config.json`.
        dtype: dtype of the weights; None: the dtype in the configuration.
        max_model_len: maximum tokens per request; None: the model's maximum.

    Raises:
        AdapMoEError: transformers cannot build the model, or the maximum length is neither given nor configured.
    """
    model, config = _build(folder)
    dtype = dtype or _dtype(config)
    text = config.get_text_config()
    _, expert_weights, _ = next(_expert_layers(model))
    rows = map(_kv_numbers, getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)
    length = max_model_len or getattr(text, "max_position_embeddings", None)
    if not length:
        raise AdapMoEError(f"{folder} has no maximum number of tokens per request; set --max-model-len")
    return StepSize(
        hidden=text.hidden_size,
        inner=round(expert_weights / (3 * text.hidden_size)),
        vocabulary=text.vocab_size,
        dtype_bytes=dtype.itemsize,
        kv_bytes=sum(rows) * dtype.itemsize,
        length=length,
    )


def _kv_numbers(layer: Any) -> int:
    """Returns how many KV-cache elements one layer keeps per token."""
    if getattr(layer, "kv_lora_rank", None):  # MLA keeps a latent vector and the rotary part of the keys
        return layer.kv_lora_rank + layer.qk_rope_head_dim
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return 2 * heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def _build(folder: Path) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
        kind: Any = next((kind for kind in kinds if type(config) in kind._model_mapping), AutoModel)
        with torch.device("meta"):
            return kind.from_config(config), config
    except Exception as error:
        raise AdapMoEError(f"{folder} cannot be sized ({reason(error)}); name the folder of a checkpoint") from None


def _dtype(config: Any) -> torch.dtype:
    dtypes = (getattr(part, "dtype", None) for part in (config, config.get_text_config()))
    return next((dtype for dtype in dtypes if dtype is not None), torch.bfloat16)


def _find(settings: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """Returns the first of these settings found in a configuration or one nested in it; of a list, the largest."""
    for name in names:
        if value := settings.get(name):
            return max(value) if isinstance(value, list) else value
    nested = (_find(value, names) for value in settings.values() if isinstance(value, dict))
    return next((value for value in nested if value), None)


def _expert_layers(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Yields for each MoE layer the number of routed experts, the weights of one expert, and those of all.

    transformers keeps the experts of a layer in one module `experts`: with tensors like `down_proj` `[experts, ...]`,
    or with one submodule per expert. DBRX has tensors `[experts * inner, hidden]`. JetMoE's attention experts, which
    have a router inside, are skipped; vLLM does not run them as a fused layer either.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        weights = sum(parameter.numel() for parameter in module.parameters())
        fused = getattr(module, "down_proj", None)
        children = [child for child, _ in module.named_children()]
        if isinstance(fused, nn.Parameter) and fused.dim() == 3:
            # LongCat's gates have more rows than experts: the others are zero experts, which have no weights.
            yield len(fused), sum(tensor.numel() // len(tensor) for tensor in module.parameters()), weights
        elif children and all(child.removeprefix("expert_").isdigit() for child in children):
            yield len(children), weights // len(children), weights
        elif "router" not in children and (count := getattr(module, "num_experts", 0)):
            yield count, weights // count, weights
