"""Which model an engine serves, as far as its configuration tells."""

from pathlib import Path
from typing import Any

from vllm.config import ModelConfig

from vllm_adapmoe.profile import ModelInfo


def model_info(model: ModelConfig) -> ModelInfo:
    """The model, as a profile names it, without its hash; `num_layers` is 0 where only the built model tells."""
    return ModelInfo(
        name=Path(model.model).name,
        architecture=model.architectures[0],
        hidden_size=model.get_hidden_size(),
        num_layers=count_moe_layers(model.hf_text_config) or 0,
        num_experts=model.get_num_experts(),
        top_k=model.get_num_experts_per_tok() or 0,
    )


def expert_sizes(model: ModelConfig) -> tuple[int, int] | None:
    """Hidden and intermediate size of a routed expert; None where the configuration does not tell."""
    config = model.hf_text_config
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    return (hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else None


def count_moe_layers(hf_config: Any) -> int | None:
    """MoE layers of a model, from its configuration; None where that does not tell."""
    layers = getattr(hf_config, "num_hidden_layers", None)
    other_rules = (
        "interleave_moe_layer_step",
        "moe_layer_interval",
        "layers_block_type",
        "moe_layers",
        "layer_types_moe",
    )
    if layers is None or any(getattr(hf_config, name, None) is not None for name in other_rules):
        return None
    dense_first = getattr(hf_config, "first_k_dense_replace", None) or 0
    every = getattr(hf_config, "moe_layer_freq", None) or 1
    step = getattr(hf_config, "decoder_sparse_step", None) or 1
    dense = set(getattr(hf_config, "mlp_only_layers", None) or ())
    if not isinstance(every, int):
        return None
    return sum(
        layer >= dense_first and layer % every == 0 and (layer + 1) % step == 0 and layer not in dense
        for layer in range(layers)
    )
