"""Shrinks the configuration of any model that transformers knows: same architecture, a few hundred thousand weights."""

from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 512
LAYERS = 4
"""Enough for patterns of three sliding or linear layers and a full one."""
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size", "n_embd"), 128),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), 128),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "ffn_hidden_size",
         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
         "moe_latent_size", "share_expert_dim"), 64,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "num_attention_groups"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 512),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 8
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "moe_layer_end_index": LAYERS - 1,
    "zero_expert_num": 4,
    "n_group": 4,
    "topk_group": 2,
    "head_dim": 32,
    "sliding_window": 32,
    "attention_chunk_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # what vLLM's MLA on the CPU computes
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,  # the smallest that vLLM's kernel on the CPU computes
    "linear_value_head_dim": 64,
    "linear_num_heads": 4,
    "linear_head_dim": 64,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 64,
    "n_groups": 1,
    "image_size": 56,
    "hidden_size_per_layer_input": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
}  # fmt: skip


def tiny_config(cls: type[PretrainedConfig], **given: Any) -> PretrainedConfig:
    """The smallest configuration of a class whose keys are known, with `given` where a family needs something else."""
    return cls(**_merged(small_keys(cls()), given))


def small_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The keys that make a configuration small, those of the configurations inside it among them."""
    keys: dict[str, Any] = {}
    config.allow_global_per_layer_attribute_access = True  # Gemma-4's
    values = {name: getattr(config, name, None) for name in config.to_dict()}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            keys[name] = {"model_type": value.model_type} | small_keys(value)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            keys[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            keys[name] = VOCABULARY - 1 - sum(key.endswith(("_token_id", "_token_index")) for key in keys)
    if "kv_lora_rank" in keys:
        keys.pop("head_dim", None)
    heads, groups = config.to_dict().get("num_attention_heads"), config.to_dict().get("num_key_value_heads")
    if heads == groups and "num_attention_heads" in keys and "num_key_value_heads" in keys:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    if values.get("n_group") == 1:
        keys |= {"n_group": 1, "topk_group": 1}
    keys |= {name: number for name, number in (("bos_token_id", 0), ("eos_token_id", 1)) if name in values}
    if values.get("pad_token_id") is not None:
        keys["pad_token_id"] = 0
    return keys


def _merged(keys: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(keys)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        elif value is ...:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged
