"""Tiny random targets and draft models for speculative decoding: dense and MoE models, EAGLE heads, and MTP layers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, VOCABULARY, save_tiny_model
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models import glm4_moe, llama, qwen3_next

HIDDEN = COMMON["hidden_size"]
INNER = 256


def save_random(config: PretrainedConfig, folder: Path) -> Path:
    """Writes a random bf16 checkpoint, and returns its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    return folder


def save_dense(folder: Path) -> Path:
    return save_random(llama.LlamaConfig(**COMMON, intermediate_size=128, head_dim=32), folder)


def save_deepseek_mtp(folder: Path) -> Path:
    return add_mtp_layer(save_tiny_model("deepseek_v3", folder), "model.layers.2.", "model.layers.3.")


def save_glm_mtp(folder: Path) -> Path:
    config = glm4_moe.Glm4MoeConfig(
        **COMMON, intermediate_size=INNER, moe_intermediate_size=64, head_dim=32, n_routed_experts=8,
        num_experts_per_tok=3, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
        norm_topk_prob=True, routed_scaling_factor=1.0,
    )  # fmt: skip
    return add_mtp_layer(save_random(config, folder), "model.layers.2.", "model.layers.3.")


def save_qwen_next_mtp(folder: Path) -> Path:
    config = qwen3_next.Qwen3NextConfig(
        **(COMMON | {"num_hidden_layers": 4}), intermediate_size=INNER, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, head_dim=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=128, linear_value_head_dim=128,
        decoder_sparse_step=1,
    )  # fmt: skip
    return add_mtp_layer(save_random(config, folder), "model.layers.3.", "mtp.layers.0.")


def add_mtp_layer(folder: Path, source: str, target: str) -> Path:
    """Adds a copy of the decoder layer `source` as the layer that predicts the next token but one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors |= {target + name.removeprefix(source): t.clone() for name, t in tensors.items() if name.startswith(source)}
    ones, zeros = (torch.full((HIDDEN,), value, dtype=torch.bfloat16) for value in (1, 0))
    if target.startswith("mtp."):  # Qwen3-Next, whose norms add one to their weights
        names = "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"
        tensors |= {"mtp.fc.weight": random(HIDDEN, 2 * HIDDEN)} | {name: zeros.clone() for name in names}
    else:
        tensors |= {
            target + "enorm.weight": ones.clone(),
            target + "hnorm.weight": ones.clone(),
            target + "eh_proj.weight": random(HIDDEN, 2 * HIDDEN),
            target + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            target + "shared_head.norm.weight": tensors["model.norm.weight"].clone(),
            target + "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }
    save_file(tensors, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    return folder


def save_eagle(folder: Path, eagle3: bool) -> Path:
    """Writes an EAGLE or EAGLE3 head of one Llama layer."""
    torch.manual_seed(1)
    layer, inputs = ("midlayer.", 2 * HIDDEN) if eagle3 else ("layers.0.", HIDDEN)
    tensors = {
        f"{layer}self_attn.{name}_proj.weight": random(rows, columns)
        for name, rows, columns in (("q", HIDDEN, inputs), ("k", 64, inputs), ("v", 64, inputs), ("o", HIDDEN, HIDDEN))
    }
    tensors |= {f"{layer}mlp.{name}_proj.weight": random(INNER, HIDDEN) for name in ("gate", "up")}
    tensors |= {f"{layer}mlp.down_proj.weight": random(HIDDEN, INNER)}
    norms = [f"{layer}post_attention_layernorm.weight"]
    if eagle3:
        norms += [f"{layer}hidden_norm.weight", f"{layer}input_layernorm.weight", "norm.weight"]
        tensors |= {"lm_head.weight": random(VOCABULARY, HIDDEN)}
    tensors |= {"fc.weight": random(HIDDEN, (3 if eagle3 else 2) * HIDDEN)}
    tensors |= {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = llama.LlamaConfig(**(COMMON | {"num_hidden_layers": 1}), intermediate_size=INNER, head_dim=32)
    settings: dict[str, Any] = config.to_dict() | {"dtype": "bfloat16"}
    settings["architectures"] = ["LlamaForCausalLMEagle3" if eagle3 else "LlamaForCausalLM"]
    if eagle3:
        settings["draft_vocab_size"] = VOCABULARY
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul(0.1).bfloat16()
