"""Writes checkpoints of random weights for the engines in common formats: bf16, block-wise FP8, and 4-bit GPTQ."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.shapes import Shape

Tensors = dict[str, torch.Tensor]
BLOCK = 128
"""Side of a block of FP8 weights that share a scale."""
GROUP = 64
"""Number of 4-bit weights in a row that share a scale."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GAIN = 1.7
"""Gain of every weight matrix, which spreads logits so that rounding rarely changes the best token."""


def fp8_blocks(weight: torch.Tensor) -> Tensors:
    """Quantises a weight, float32 `[rows, columns]`, to float8 with a scale for each block."""
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    weight = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight to values 0 to 15 around 8, `[rows, columns]`, and scales `[rows, groups]`."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() + 8).flatten(1).to(torch.int64), scale.squeeze(2).to(torch.bfloat16)


def pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Packs eight 4-bit values into an int32 along the last dimension; `order`: places of the values in it."""
    shifts = torch.tensor([4 * order.index(place) for place in range(8)], device=values.device)
    return (values.unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def gptq(weight: torch.Tensor) -> Tensors:
    """Quantises a weight, float32 `[rows, columns]`, to GPTQ's format."""
    values, scale = int4(weight)
    zeros = torch.full_like(scale.t(), 7).to(torch.int64)  # GPTQ stores zero points minus one
    return {
        "qweight": pack(values).t().contiguous(),
        "qzeros": pack(zeros),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1], device=weight.device) // GROUP).to(torch.int32),
    }


def fp8_config(unquantised: list[str]) -> dict[str, Any]:
    """Returns the `quantization_config` of a block-wise FP8 checkpoint; `unquantised`: names of modules."""
    return {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "ignored_layers": unquantised,
    }  # fmt: skip


def gptq_config() -> dict[str, Any]:
    """Returns the `quantization_config` of a GPTQ checkpoint with unquantised attention and router."""
    return {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False,
        "dynamic": {r"-:.*self_attn.*": {}, r"-:.*\.gate$": {}},
    }  # fmt: skip


QUANTISE: dict[str, Callable[[torch.Tensor], Tensors] | None] = {"bf16": None, "fp8": fp8_blocks, "gptq": gptq}
"""Function that quantises an expert's weight, by format; None: not quantised."""


def model_config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """Returns the `config.json` of a Qwen3-MoE; attention as in Qwen3-30B-A3B, as far as the hidden size allows."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": 3 * shape.hidden, "moe_intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_experts": shape.experts, "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "head_dim": min(128, shape.hidden // 4), "num_attention_heads": min(32, shape.hidden // 16),
        "num_key_value_heads": min(4, shape.hidden // 32), "attention_bias": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 4096, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def write_checkpoint(folder: Path, shape: Shape, kind: str, vocabulary: int, device: torch.device, seed: int) -> Path:
    """Writes a random model whose experts are in the format `kind` of `QUANTISE` into `folder`, and returns it."""
    from safetensors.torch import save_file  # installed with vLLM, the only reader of the checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape, vocabulary)
    blocks = [f"model.layers.{layer}" for layer in range(shape.layers)]
    if kind == "fp8":
        names = [f"{block}.self_attn.{name}" for block in blocks for name in PROJECTIONS]
        config["quantization_config"] = fp8_config([*names, *(f"{block}.mlp.gate" for block in blocks), "lm_head"])
    elif kind == "gptq":
        config["quantization_config"] = gptq_config()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(_tensors(config, blocks, QUANTISE[kind], device, seed))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(
    config: dict[str, Any],
    blocks: list[str],
    quantise: Callable[[torch.Tensor], Tensors] | None,
    device: torch.device,
    seed: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inner, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]

    def drawn(rows: int, columns: int, spread: float | None = None) -> torch.Tensor:
        spread = GAIN * columns**-0.5 if spread is None else spread
        return torch.randn(rows, columns, generator=generator, device=device) * spread

    def plain(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value.to(torch.bfloat16).cpu().contiguous()

    ones = torch.ones(hidden)
    yield plain("model.embed_tokens.weight", drawn(config["vocab_size"], hidden, 1.0))
    yield plain("lm_head.weight", drawn(config["vocab_size"], hidden))
    yield plain("model.norm.weight", ones)
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = dict(zip(PROJECTIONS, ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)), strict=True))
    for block in blocks:
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield plain(f"{block}.{name}.weight", ones)
        for name in ("q_norm", "k_norm"):
            yield plain(f"{block}.self_attn.{name}.weight", torch.ones(head))
        for name, size in sizes.items():
            yield plain(f"{block}.self_attn.{name}.weight", drawn(*size))
        yield plain(f"{block}.mlp.gate.weight", drawn(config["num_experts"], hidden))
        for expert in range(config["num_experts"]):
            for name, size in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                prefix, weight = f"{block}.mlp.experts.{expert}.{name}", drawn(*size)
                if quantise is None:
                    yield plain(f"{prefix}.weight", weight)
                    continue
                for suffix, part in quantise(weight).items():
                    yield f"{prefix}.{suffix}", part.cpu().contiguous()
