"""What the folder of a checkpoint holds: sizes of the model, from its configuration."""

from pathlib import Path
from typing import Any

import torch

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.memory_plan import ModelSize, StepSize
from vllm_adapmoe.profile import ModelInfo
from vllm_adapmoe.store.record import align

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")


def has_weights(folder: Path) -> bool:
    """Whether a folder has more of a checkpoint than its configuration."""
    return any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES)


def measure_checkpoint(
    folder: Path, dtype: torch.dtype | None, expert_bits: float | None
) -> tuple[ModelInfo, ModelSize]:
    """Sizes of a model, from its configuration alone: the model is built without memory for its weights.

    Args:
        folder: with `config.json`; weights need not be there.
        dtype: of the weights; None: what the configuration says.
        expert_bits: bits of a weight of a routed expert, scales included; None: those of `dtype`.

    Returns:
        The model as a profile names it, without a hash, and its sizes.

    Raises:
        AdapMoEError: no configuration, or one that transformers cannot build or that has no routed experts.
    """
    model, config = _build(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    if expert_bits is None and getattr(config, "quantization_config", None) is not None:
        raise AdapMoEError(f"{folder} is quantised; say with --expert-bits how many bits a weight of an expert takes")
    bits = expert_bits or 8 * dtype.itemsize
    architectures = config.architectures or [type(model).__name__]
    config = config.get_text_config()
    top_k = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), 0)
    count, layers, expert_weights, other = _count(model)
    if not layers or not top_k or not count:
        raise AdapMoEError(f"{folder} has no routed experts; take a mixture-of-experts model")
    if len(set(layers.values())) > 1:
        raise AdapMoEError(f"{folder} has experts of several sizes; adapmoe plan knows models with one")
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    read = other if output is None or output.weight is embedding else other - embedding.numel()
    info = ModelInfo(
        name=folder.resolve().name,
        architecture=architectures[0],
        hidden_size=config.hidden_size,
        num_layers=len(layers),
        num_experts=count,
        top_k=top_k,
    )
    size = ModelSize(
        num_layers=len(layers),
        num_experts=count,
        top_k=top_k,
        expert_bytes=align(round(expert_weights * bits / 8)),
        other_bytes=other * dtype.itemsize,
        read_bytes=read * dtype.itemsize,
        all_layers=config.num_hidden_layers,
    )
    return info, size


def measure_step(folder: Path, dtype: torch.dtype | None, max_model_len: int | None) -> StepSize:
    """Sizes of what a step computes with, from the configuration alone.

    Args:
        folder: with `config.json`.
        dtype: of the weights; None: what the configuration says.
        max_model_len: tokens of a request at most; None: as many as the model takes.

    Raises:
        AdapMoEError: as `measure_checkpoint`.
    """
    model, config = _build(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    config = config.get_text_config()
    *_, expert_weights, _ = _count(model)
    if getattr(config, "kv_lora_rank", None):  # MLA keeps a latent vector and the keys' rotated part
        row = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        row = 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return StepSize(
        hidden=config.hidden_size,
        inner=round(expert_weights / (3 * config.hidden_size)),
        vocabulary=config.vocab_size,
        dtype_bytes=dtype.itemsize,
        kv_bytes=config.num_hidden_layers * row * dtype.itemsize,
        length=max_model_len or config.max_position_embeddings,
    )


def _build(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), config
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapMoEError(f"{folder} cannot be sized ({reason}); name the folder of a checkpoint") from None


def _count(model: Any) -> tuple[int, dict[str, int], int, int]:
    """Experts of a layer, weights of all experts by layer, weights of one expert, and of all else.

    transformers keeps the experts of a layer in one module `experts`, as tensors `[experts, ...]` or as a list.
    """
    layers: dict[str, int] = {}
    count = other = 0
    for name, parameter in model.named_parameters():
        place, found, rest = name.partition(".experts.")
        if not found:
            other += parameter.numel()
            continue
        layers[place] = layers.get(place, 0) + parameter.numel()
        index = rest.partition(".")[0]
        count = max(count, int(index) + 1 if index.isdigit() else parameter.shape[0])
    return count, layers, next(iter(layers.values()), 0) // max(1, count), other
