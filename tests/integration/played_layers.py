"""Single MoE layers of models that exist as a `config.json` only, built by vLLM in any expert format.

To be imported after `played_platform.install`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

HIDDEN, INNER, EXPERTS, TOP_K = 512, 512, 8, 2
MODEL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 512,
    "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "max_position_embeddings": 512, "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = MODEL | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 7.0,
}  # fmt: skip


def start(folder: Path) -> None:
    """Makes this process the only rank."""
    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    with set_current_vllm_config(VllmConfig()):
        initialize_model_parallel(1, 1)


def save(name: str, quantisation: dict[str, Any] | None, folder: Path) -> Path:
    """A checkpoint without weights."""
    model = GPT_OSS if "gpt-oss" in name else MODEL
    if quantisation is not None:
        model = model | {"quantization_config": quantisation}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def configure(folder: Path, **more: Any) -> VllmConfig:
    args = {"max_model_len": 512, "skip_tokenizer_init": True, "load_format": "dummy"}
    return EngineArgs(model=str(folder), **(args | more)).create_engine_config()


def build(vllm_config: VllmConfig, name: str) -> RoutedExperts:
    """One layer, as the model would build it."""
    vllm_config.compilation_config.static_forward_context.clear()
    more: dict[str, Any] = {"activation": "swigluoai", "has_bias": True} if "gpt-oss" in name else {}
    with set_current_vllm_config(vllm_config), torch.device("cpu"):
        runner = FusedMoEFactory(
            num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INNER, params_dtype=torch.bfloat16,
            quant_config=vllm_config.quant_config, prefix="model.layers.0.mlp.experts", **more,
        )  # fmt: skip
    return runner.routed_experts
