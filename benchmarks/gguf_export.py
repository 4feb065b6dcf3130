"""Exports a Mixtral or Qwen3-MoE checkpoint as a GGUF file for llama.cpp, without a tokenizer, and quantises it."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from benchmarks.peer_packages import need
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_model_config

SOURCE = "adapmoe.source"
"""GGUF key that stores the hash of the exported checkpoint."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names an architecture and the tensors that differ between architectures."""

    name: str
    moe: str
    """Name of the MoE block in a layer of the checkpoint."""
    projections: dict[str, str]
    """GGUF name of each projection of an expert."""
    head_norms: dict[str, str]
    """GGUF name of each norm over the heads of queries and keys."""
    permutes_rotary: bool
    """Whether rotary embedding pairs neighbours in llama.cpp (`permute_rotary`)."""
    inner_size: str
    """Key of an expert's intermediate size."""


ARCHITECTURES = {
    "mixtral": Architecture(
        name="llama",
        moe="block_sparse_moe",
        projections={"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"},
        head_norms={},
        permutes_rotary=True,
        inner_size="intermediate_size",
    ),
    "qwen3_moe": Architecture(
        name="qwen3moe",
        moe="mlp",
        projections={"gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps"},
        head_norms={"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
        permutes_rotary=False,
        inner_size="moe_intermediate_size",
    ),
}
"""By `model_type`. llama.cpp renormalises the weights of the chosen experts in both (`src/models/*.cpp`)."""


def permute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Permutes the rows of a q or k projection into the order of llama.cpp's `llama` architecture.

    In the checkpoint, rotary embedding pairs the first half of a head with the second half; in llama.cpp, neighbours.

    Args:
        weight: `[heads * head_dim, hidden]`.
        heads: query heads for q, key heads for k.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Shape in torch's order, outermost dimension first."""
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise AdapMoEError(f"{str(path)!r} cannot be read ({error}); complete the checkpoint") from None


class Checkpoint:
    """Tensors of a folder of safetensors files, read on access."""

    def __init__(self, folder: Path) -> None:
        files = [_open(path) for path in sorted(folder.glob("*.safetensors"))]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def read_config(model: Path) -> dict[str, Any]:
    """Reads the `config.json` of a Mixtral or Qwen3-MoE model.

    Raises:
        AdapMoEError: another architecture, or a variant that cannot be exported.
    """
    config = read_model_config(model)
    if config.get("model_type") not in ARCHITECTURES:
        raise AdapMoEError(
            f"{model} has model_type {config.get('model_type')!r}; llama.cpp is compared on "
            f"{' and '.join(ARCHITECTURES)} only"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, value, fine in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("sliding_window", config.get("sliding_window"), None),
        ("dtype", config.get("dtype") or config.get("torch_dtype"), "bfloat16"),
        ("norm_topk_prob", config.get("norm_topk_prob", True), True),
        ("mlp_only_layers", config.get("mlp_only_layers") or [], []),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
    ):
        if value != fine:
            raise AdapMoEError(f"{model} has {key} {value!r}; for llama.cpp only {fine!r} is exported")
    return config


def tensors_of(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors of the GGUF file, each read when it is written; the experts of a layer are merged.

    Norms and routers are float32, as llama.cpp requires; everything else stays bfloat16.
    """
    architecture = ARCHITECTURES[config["model_type"]]

    def plain(source: str, name: str, dtype: torch.dtype) -> Tensor:
        return Tensor(f"{name}.weight", checkpoint.shape(source), dtype, lambda: checkpoint.read(source))

    def rotary(source: str, name: str, heads: int) -> Tensor:
        read = lambda: permute_rotary(checkpoint.read(source), heads)  # noqa: E731
        return Tensor(f"{name}.weight", checkpoint.shape(source), torch.bfloat16, read)

    def merged(sources: list[str], name: str) -> Tensor:
        shape = (len(sources), *checkpoint.shape(sources[0]))
        read = lambda: torch.stack([checkpoint.read(source) for source in sources])  # noqa: E731
        return Tensor(f"{name}.weight", shape, torch.bfloat16, read)

    present = set(checkpoint.names())
    for source, name in OUTSIDE.items():
        if f"{source}.weight" in present:  # without lm_head, llama.cpp uses the embedding
            yield plain(f"{source}.weight", name, torch.float32 if name.endswith("norm") else torch.bfloat16)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        for key, name in NORMS.items():
            yield plain(f"{source}.{key}.weight", f"{block}.{name}", torch.float32)
        for key, name in ATTENTION.items():
            weight = f"{source}.self_attn.{key}.weight"
            if key in heads and architecture.permutes_rotary:
                yield rotary(weight, f"{block}.{name}", heads[key])
            else:
                yield plain(weight, f"{block}.{name}", torch.bfloat16)
        for key, name in architecture.head_norms.items():
            yield plain(f"{source}.self_attn.{key}.weight", f"{block}.{name}", torch.float32)
        moe = f"{source}.{architecture.moe}"
        yield plain(f"{moe}.gate.weight", f"{block}.ffn_gate_inp", torch.float32)
        for key, name in architecture.projections.items():
            experts = range(num_experts(config))
            yield merged([f"{moe}.experts.{expert}.{key}.weight" for expert in experts], f"{block}.{name}")


def export(model: Path, path: Path, source: str) -> None:
    """Writes the GGUF file of a checkpoint atomically, with at most one tensor in memory.

    Args:
        model: folder of a Mixtral or Qwen3-MoE checkpoint in bfloat16.
        path: GGUF file to write.
        source: hash of the checkpoint, which `exported_from` returns.

    Raises:
        AdapMoEError: another architecture, or package gguf is missing.
    """
    config = read_config(model)
    gguf = need("gguf")
    checkpoint = Checkpoint(model)
    architecture = ARCHITECTURES[config["model_type"]]
    if missing := [name for name in checkpoint.names() if not _known(name, architecture)]:
        raise AdapMoEError(
            f"{model} has a tensor {missing[0]!r} that the GGUF file has no place for; use another model"
        )
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    _describe(writer, config, source)
    tensors = list(tensors_of(checkpoint, config))
    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    for tensor in tensors:
        nbytes = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint16), nbytes, types[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(tensors, desc="Writing GGUF", unit="tensor", leave=False):
        data = tensor.read().to(tensor.dtype).contiguous()
        writer.write_tensor_data(data.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32).numpy())
    writer.close()
    temporary.replace(path)


def exported_from(path: Path) -> str | None:
    """Returns the hash of the checkpoint that a GGUF file was exported from; None: no file, or not by `export`."""
    with suppress(OSError, ValueError):
        field = need("gguf").GGUFReader(path).get_field(SOURCE)
        return None if field is None else str(field.contents())
    return None


def quantise(path: Path, to: Path, format: str) -> None:
    """Quantises a GGUF file by llama.cpp's own function, with its defaults, atomically.

    Args:
        path: the GGUF file in bfloat16.
        to: file to write.
        format: name of a type of file of llama.cpp (`LLAMA_FTYPE_MOSTLY_...`), such as Q8_0.

    Raises:
        AdapMoEError: llama.cpp refuses, or package llama-cpp-python is missing.
    """
    api = need("llama_cpp")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{format}")
    parameters.nthread = len(os.sched_getaffinity(0))
    temporary = to.with_name(to.name + ".tmp")
    if api.llama_model_quantize(os.fsencode(path), os.fsencode(temporary), parameters):
        temporary.unlink(missing_ok=True)
        raise AdapMoEError(f"llama.cpp cannot quantise {path} to {format}; leave out that contender")
    temporary.replace(to)


def num_experts(config: dict[str, Any]) -> int:
    """Returns the number of routed experts of a layer."""
    return config.get("num_local_experts") or config["num_experts"]


def _known(name: str, architecture: Architecture) -> bool:
    layer = r"model\.layers\.\d+\."
    attention = "|".join([*ATTENTION, *architecture.head_norms])
    experts = rf"{architecture.moe}\.(gate|experts\.\d+\.({'|'.join(architecture.projections)}))"
    inside = rf"({'|'.join(NORMS)}|self_attn\.({attention})|{experts})"
    return re.fullmatch(rf"({'|'.join(OUTSIDE)}|{layer}{inside})\.weight", name) is not None


def _describe(writer: Any, config: dict[str, Any], source: str) -> None:
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_string(SOURCE, source)
    writer.add_tokenizer_model("none")  # token ids go in and come out
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    inner = config[ARCHITECTURES[config["model_type"]].inner_size]
    writer.add_feed_forward_length(inner)
    writer.add_expert_feed_forward_length(inner)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 1e6))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
