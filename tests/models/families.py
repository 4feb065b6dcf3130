"""What some families need beside small sizes: names that differ, and keys that go together."""

from typing import Any


class CannotMake(Exception):
    """No tiny checkpoint of an architecture can be made; the message says why."""


ALIASES = {
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
}
"""vLLM's name of an architecture -> transformers'."""

GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}}
QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "hc_lowrank": 32, "ngram_vocab_size_base": 1000, "split_ngram_parts": 1,
}  # fmt: skip
LATENT = {"topk_method": "noaux_tc"}
"""DeepSeek's key for a router with a correction, which transformers' configuration does not write."""

FAMILIES: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "AXK1ForCausalLM": LATENT | {"first_k_dense_replace": 0},
    "AriaForConditionalGeneration": {
        "text_config": {"moe_num_experts": 8},
        "projector_patch_to_query_dict": {16: 4},
    },
    "Cosmos3EdgeForConditionalGeneration": {"text_config": MROPE, "projector_hidden_size": 128},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "DeepseekV2ForCausalLM": {
        "topk_method": "group_limited_greedy", "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    },
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": LATENT,
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": GEMMA4,
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
        },
    },
    "Dots1ForCausalLM": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4ForConditionalGeneration": {"text_config": GEMMA4},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": GEMMA4},
    "Glm5NextForConditionalGeneration": {"vision_config": {"projection_intermediate_size": 128}},
    "GlmMoeDsaForCausalLM": LATENT,
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": LATENT | {"first_k_dense_replace": 1},
    "GraniteMoeSharedForCausalLM": {"shared_intermediate_size": 64},
    "GraniteMoeSWAForCausalLM": {"shared_intermediate_size": 64},
    "HYV3ForCausalLM": {
        "first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True,
    },
    "HunYuanMoEV1ForCausalLM": {
        "head_dim": 32, "num_key_value_heads": 2, "num_experts": 8, "moe_topk": 2, "use_mixed_mlp_moe": True,
        "num_shared_expert": 1, "moe_intermediate_size": 128, "use_qk_norm": True, "use_cla": False,
    },
    "InklingForCausalLM": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32, "sliding_window_size": 32,
        "rel_extent": 64,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
    "Llama4ForConditionalGeneration": {
        "text_config": {"num_experts_per_tok": 1},
        "vision_config": {
            "projector_input_dim": 128, "projector_output_dim": 128, "vision_output_dim": 128,
            "pixel_shuffle_ratio": 0.5, "intermediate_size": 512,
        }
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "MiMoV2FlashForCausalLM": {
        "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-6,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1,
        "n_shared_experts": None, "attention_value_scale": None, "sliding_window_size": 32,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32, "swa_v_head_dim": 32,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "add_swa_attention_sink_bias": True,
    },
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "Qwen3OmniMoeForConditionalGeneration": {
        "enable_audio_output": False,  # vLLM serves the thinker alone
        "thinker_config": {
            "audio_config": {
                "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "output_dim": 128, "downsample_hidden_size": 32,
            },
            "text_config": MROPE,
        },
    },
    "Qwen3VLMoeForConditionalGeneration": {"text_config": MROPE, "vision_config": {"num_position_embeddings": 64}},
    "Qwen4ExpForCausalLM": QWEN4,
    "Qwen4ExpForConditionalGeneration": {"text_config": QWEN4},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Keys of the configuration, nested as it is; `...` leaves out what `tiny_config` would set."""
