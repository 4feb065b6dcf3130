"""Writes a tiny random checkpoint of an architecture that transformers has no code for, from vLLM's own model.

vLLM's model says which parameters there are; its loader's rules, turned around, say under which names a checkpoint
has them.
"""

import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""What vLLM makes one matrix of, unless the model says otherwise."""
RENAMED = {"DeepseekV4ForCausalLM": {"lm_head.weight": "head.weight"}}
"""What a model's loader would take for something else by vLLM's own name."""
STACKED = {"Step3TextForCausalLM"}
"""Whose checkpoints have one tensor of all experts of a layer."""


def save_mirror(folder: Path) -> None:
    """Builds vLLM's model of the configuration in a folder, and saves a checkpoint of it there.

    Builds it in a fork, which takes with it what vLLM sets up in a process for that.
    """
    child = os.fork()
    if child == 0:
        try:
            save_random(build(folder), folder)
        except BaseException:
            traceback.print_exc()
            (folder / "error").write_text(traceback.format_exc().strip().splitlines()[-1])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if (folder / "error").exists():
        raise RuntimeError((folder / "error").read_text())


def build(folder: Path) -> nn.Module:
    """VLLM's model without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
    from vllm.utils.torch_utils import set_default_torch_dtype

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=320,
        enforce_eager=True,
        language_model_only=architecture in _MULTIMODAL_MODELS,
        enable_prefix_caching=False,  # which models with a state and latent attention do not have on the CPU
    )
    config = args.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1)
        return initialize_model(vllm_config=config)


def save_random(model: nn.Module, folder: Path, seed: int = 0) -> None:
    """Saves random weights under the names that the model loads them by."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape, dtype in checkpoint_tensors(model):
        if not dtype.is_floating_point:  # DeepSeek-V4's table of tokens' experts
            rows = torch.arange(shape[0])[:, None] * 3
            tensor = (rows + torch.arange(shape[1])) % 8
        elif name.endswith(("correction_bias", "expert_bias")):
            tensor = torch.randn(shape, generator=generator) * 0.1
        elif len(shape) < 2:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=generator) * (1.0 if "embed" in name else 0.15)
        tensors[RENAMED.get(type(model).__name__, {}).get(name, name)] = tensor.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and type of every tensor that a checkpoint of the model has."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    packed = PARTS | {name: list(parts) for name, parts in getattr(model, "packed_modules_mapping", {}).items()}
    seen = set()
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            yield from _experts(model, path, module)
            seen |= {f"{path}.{name}" for name, _ in module.named_parameters()}
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full in seen:
                continue
            seen.add(full)
            parent, _, last = path.rpartition(".")
            sizes = None
            if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
                sizes = list(module.output_sizes)
            if sizes is None or last not in packed or len(packed[last]) != len(sizes):
                yield full, tuple(parameter.shape), parameter.dtype
                continue
            for part, size in zip(packed[last], sizes, strict=True):
                yield f"{parent}.{part}.{name}", (size, *parameter.shape[1:]), parameter.dtype


def _experts(model: nn.Module, path: str, module: Any) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """The experts of a layer, one by one and named as in nearly all checkpoints."""
    shapes = dict(module.named_parameters())
    parent, _, kind = path.removesuffix(".routed_experts").rpartition(".")
    first = module.local_num_experts if kind == "vision_experts" else 0  # Ernie has them after those for text
    if type(model).__name__ in STACKED:
        experts, both, hidden = shapes["w13_weight"].shape
        for part in ("gate_proj", "up_proj"):
            yield f"{parent}.{part}.weight", (experts, both // 2, hidden), shapes["w13_weight"].dtype
        yield f"{parent}.down_proj.weight", tuple(shapes["w2_weight"].shape), shapes["w2_weight"].dtype
        return
    names = getattr(model, "packed_modules_mapping", {}).get("gate_up_proj")
    gate, up, down = ("w1", "w3", "w2") if names == ["w1", "w3"] else ("gate_proj", "up_proj", "down_proj")
    for expert in range(first, first + module.local_num_experts):
        w13, w2 = shapes["w13_weight"], shapes["w2_weight"]
        for part in (gate, up):
            yield f"{parent}.experts.{expert}.{part}.weight", (w13.shape[1] // 2, w13.shape[2]), w13.dtype
        yield f"{parent}.experts.{expert}.{down}.weight", tuple(w2.shape[1:]), w2.dtype
