"""Configurations of architectures that transformers has no class for, or saves other tensors of than are published.

Every key that vLLM's model asks for is there.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # what vLLM's MLA on the CPU computes
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
BAILING = {
    "embedding_dropout": 0.0, "moe_shared_expert_intermediate_size": 64, "use_qk_norm": True, "use_rmsnorm": True,
}  # fmt: skip
SIGMOID = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "n_group": 4, "topk_group": 2}
MIMO = {
    "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-6,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32, "sliding_window": 32,
    "sliding_window_size": 32, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "BailingMoeForCausalLM": BAILING | {"model_type": "bailing_moe"},
    "BailingMoeV2ForCausalLM": BAILING | SIGMOID | {"model_type": "bailing_moe_v2"},
    "BailingMoeV2_5ForCausalLM": LATENT | BAILING | SIGMOID | {"model_type": "bailing_hybrid", "layer_group_size": 2},
    "BailingMoeV3ForCausalLM": LATENT
    | BAILING
    | SIGMOID
    | {"model_type": "bailing_hybrid", "layer_group_size": 2, "short_conv_kernel_size": 4, "no_kda_lora": True},
    "DeepseekForCausalLM": {"model_type": "deepseek", "moe_layer_freq": 1},
    "DeepseekV4ForCausalLM": {
        "model_type": "deepseek_v4", "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
        "q_lora_rank": 64, "o_lora_rank": 32, "o_groups": 2, "compress_ratios": [0] * 4,
        "compress_rope_theta": 160000.0,
        "index_n_heads": 4, "index_head_dim": 128, "index_topk": 64, "sliding_window": 128, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 10.0, "num_hash_layers": 1,
        "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "model_type": "ernie4_5_moe_vl", "moe_num_experts": [8, 8], "moe_intermediate_size": [64, 64], "moe_k": 2,
        "moe_layer_start_index": [1, 1], "moe_layer_end_index": [3, 3], "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]},
        "freq_allocation": 4, "im_patch_id": 511, "pixel_hidden_size": 128, "spatial_conv_size": 2,
        "temporal_conv_size": 2, "use_temporal_conv": True,
        "vision_config": {
            "depth": 2, "embed_dim": 128, "hidden_size": 128, "hidden_act": "quick_gelu", "in_channels": 3,
            "mlp_ratio": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2,
        },
    },
    "K2HorizonForCausalLM": {
        "model_type": "k2_horizon", "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_gate_func": None,
        "layernorm_num_groups": 1, "moe_gate_bias": False, "mova_num_experts": 0, "mova_num_experts_per_tok": 0,
        "query_key_norm": True, "rope_head_dim": 32, "router_scaling_factor": 1.0, "router_score_func": "softmax",
    },
    "LongcatFlashForCausalLM": LATENT | {
        "model_type": "longcat_flash", "hidden_size": 256, "num_layers": 4, "moe_topk": 2, "zero_expert_num": 4,
        "zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    },
    "MiMoV2ForCausalLM": MIMO | {"model_type": "mimo_v2", "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "PanguProMoEV2ForCausalLM": {"model_type": "pangu_pro_moe_v2"},
    "PanguUltraMoEForCausalLM": LATENT | {"model_type": "pangu_ultra_moe"},
    "Param2MoEForCausalLM": {"model_type": "param2moe", "rope_scaling": None, "use_qk_norm": True},
    "SarvamMLAForCausalLM": LATENT | SIGMOID | BAILING | {
        "model_type": "sarvam_mla", "head_dim": 512 + 64, "q_lora_rank": None,
    },
    "SarvamMoEForCausalLM": SIGMOID | BAILING | {"model_type": "sarvam_moe"},
    "Step3TextForCausalLM": {
        "model_type": "step3_text", "max_position_embedding": 512, "moe_num_experts": 8, "moe_top_k": 2,
        "norm_expert_weight": True, "share_expert_dim": 64, "share_q_dim": 64, "moe_layers_enum": "1,2,3",
    },
    "Step3p5ForCausalLM": {
        "model_type": "step3p5", "moe_num_experts": 8, "moe_top_k": 2, "norm_expert_weight": True,
        "share_expert_dim": 64, "num_attention_groups": 2, "moe_layers_enum": "1,2,3", "att_impl_type": "GQA",
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 4,
                                    "num_attention_groups": 2, "head_dim": 32},
        "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 32, "swiglu_limits": None,
        "swiglu_limits_shared": None, "need_fp32_gate": True, "use_moe_router_bias": True,
        "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 1.0, "rope_theta": [10000.0] * 4,
        "partial_rotary_factors": [1.0] * 4, "use_rope_layers": None,
    },
}  # fmt: skip
REASONS = {
    "LongcatFlashNgramForCausalLM": "wants model runner V2, which vLLM has not on the CPU",
    "NemotronHPuzzleForCausalLM": "a configuration of its own; NemotronH's experts do not run on the CPU",
    "MistralLarge3ForCausalLM": "Mistral's own format; DeepSeek-V3's model",
}
"""Why there is none, where there is a better one than that transformers has no class."""


class OwnConfig(PretrainedConfig):
    """Any keys; those of the vision part are attributes, too."""

    def __post_init__(self, vision_config: dict[str, Any] | None = None, **keys: Any) -> None:
        super().__post_init__(**keys)
        if vision_config is not None:
            self.vision_config = PretrainedConfig(**vision_config)


def register(architecture: str, folder: Path) -> None:
    """Writes `config.json`, and makes a class for it known to transformers in this process."""
    keys = COMMON | CONFIGS[architecture]
    (folder / "config.json").write_text(
        json.dumps(keys | {"architectures": [architecture], "dtype": "bfloat16"}, indent=1)
    )
    cls = type("TinyConfig", (OwnConfig,), {"model_type": keys["model_type"]})
    AutoConfig.register(keys["model_type"], cls, exist_ok=True)
