"""Tiny randomly initialised checkpoints that many tests share; of any other architecture: `tests/models`."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models import deepseek_v2, deepseek_v3, hunyuan_v1_moe, mixtral, qwen3_moe, zaya

VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT_ATTENTION = COMMON | {
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": mixtral.MixtralConfig(
        **COMMON, intermediate_size=128, head_dim=32, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(
        **COMMON,
        intermediate_size=256,
        moe_intermediate_size=64,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "deepseek_v2": deepseek_v2.DeepseekV2Config(
        **LATENT_ATTENTION, topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=2.0
    ),
    "deepseek_v3": deepseek_v3.DeepseekV3Config(
        **LATENT_ATTENTION, norm_topk_prob=True, routed_scaling_factor=2.5
    ),
}  # fmt: skip

UNUSUAL_ROUTERS: dict[str, PretrainedConfig] = {
    # An MLP with a state that goes from layer to layer, over one choice more than there are experts.
    "zaya": zaya.ZayaConfig(
        **(COMMON | {"num_hidden_layers": 4, "pad_token_id": 2}),
        head_dim=32,
        moe_intermediate_size=64,
        router_hidden_size=32,
        num_experts=8,
    ),
    # Layers differ in how many experts a token uses.
    "hunyuan_v1_moe": hunyuan_v1_moe.HunYuanMoEV1Config(
        **(COMMON | {"num_hidden_layers": 4}), head_dim=32, intermediate_size=64, num_experts=8, moe_topk=[2, 3, 1, 2]
    ),
}
"""For the Transformers backend."""


def save_tiny_model(architecture: str, folder: Path, seed: int = 0, made_by: type = AutoModelForCausalLM) -> Path:
    """Writes a random bf16 checkpoint of `architecture` into `folder`, and returns the folder."""
    torch.manual_seed(seed)
    model = made_by.from_config((CONFIGS | UNUSUAL_ROUTERS)[architecture], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # The default 0.02 leaves logits so close together that any rounding changes the argmax.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    if architecture == "deepseek_v3":
        model.config.topk_method = "noaux_tc"
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder
