"""The GGUF file of the bundled model, read back: names, shapes, values."""

import json

import pytest
import torch
from conftest import TINY_MIXTRAL
from safetensors import safe_open

from vllm_adapmoe.config import AdapMoEError

gguf = pytest.importorskip("gguf")

from benchmarks.gguf_export import export, exported_from, permute_rotary  # noqa: E402

CONFIG = json.loads((TINY_MIXTRAL / "config.json").read_text())
LAYERS, EXPERTS = CONFIG["num_hidden_layers"], CONFIG["num_local_experts"]
HEADS, KEY_HEADS = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export(TINY_MIXTRAL, path, "a hash")
    return path


@pytest.fixture(scope="module")
def read(path):
    """Names -> torch tensors, bfloat16 or float32."""
    tensors = {}
    for one in gguf.GGUFReader(path).tensors:
        shape = one.shape.tolist()[::-1]
        data = torch.from_numpy(one.data.copy())
        bf16 = one.tensor_type == gguf.GGMLQuantizationType.BF16
        tensors[one.name] = (data.view(torch.bfloat16) if bf16 else data).reshape(shape)
    return tensors


@pytest.fixture(scope="module")
def checkpoint():
    with safe_open(TINY_MIXTRAL / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_every_tensor_is_there_with_its_type(read, checkpoint):
    assert len(read) == 3 + LAYERS * (2 + 4 + 1 + 3)
    assert sum(one.numel() for one in read.values()) == sum(one.numel() for one in checkpoint.values())
    for name, one in read.items():
        single = name.endswith(("norm.weight", "ffn_gate_inp.weight"))
        assert one.dtype == (torch.float32 if single else torch.bfloat16), name


def test_experts_are_merged_in_order(read, checkpoint):
    for layer in range(LAYERS):
        for key, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            merged = read[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert merged.shape[0] == EXPERTS
            for expert in range(EXPERTS):
                source = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{key}.weight"
                assert torch.equal(merged[expert], checkpoint[source])


def test_the_others_keep_their_values(read, checkpoint):
    pairs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    pairs |= {"model.layers.3.self_attn.v_proj": "blk.3.attn_v", "model.layers.3.self_attn.o_proj": "blk.3.attn_output"}
    pairs |= {"model.layers.3.block_sparse_moe.gate": "blk.3.ffn_gate_inp"}
    pairs |= {"model.layers.3.post_attention_layernorm": "blk.3.ffn_norm"}
    for source, name in pairs.items():
        assert torch.equal(read[f"{name}.weight"].float(), checkpoint[f"{source}.weight"].float()), name


def test_rotary_rows_alternate_between_the_halves_of_a_head(read, checkpoint):
    for key, heads in (("q", HEADS), ("k", KEY_HEADS)):
        source = checkpoint[f"model.layers.5.self_attn.{key}_proj.weight"]
        found = read[f"blk.5.attn_{key}.weight"]
        dim = source.shape[0] // heads
        for head in range(heads):
            for row in range(dim // 2):
                assert torch.equal(found[head * dim + 2 * row], source[head * dim + row])
                assert torch.equal(found[head * dim + 2 * row + 1], source[head * dim + dim // 2 + row])


def test_permuting_keeps_what_attention_computes():
    """Rotating neighbours of permuted rows gives the scores of rotating halves of the original ones."""
    torch.manual_seed(0)
    dim, hidden, position = 8, 16, 5
    q, k = torch.randn(dim, hidden), torch.randn(dim, hidden)
    x, y = torch.randn(hidden), torch.randn(hidden)
    angles = position / 1e4 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos(), angles.sin()

    def halves(v):
        first, second = v[: dim // 2], v[dim // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def neighbours(v):
        first, second = v[0::2], v[1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], 1).flatten()

    expected = halves(q @ x) @ (k @ y)
    assert torch.allclose(neighbours(permute_rotary(q, 1) @ x) @ (permute_rotary(k, 1) @ y), expected, atol=1e-4)


def test_the_file_says_what_it_is(path):
    reader = gguf.GGUFReader(path)
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.model"] == "none"
    assert found["llama.expert_count"] == EXPERTS
    assert found["llama.expert_used_count"] == CONFIG["num_experts_per_tok"]
    assert found["llama.attention.head_count_kv"] == KEY_HEADS
    assert found["llama.rope.freq_base"] == CONFIG["rope_parameters"]["rope_theta"]
    assert exported_from(path) == "a hash"
    assert exported_from(path.with_name("none.gguf")) is None
    assert [one.name for one in path.parent.iterdir()] == ["model.gguf"]


def test_another_architecture_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen3_moe"}))
    with pytest.raises(AdapMoEError, match=r"qwen3_moe.*mixtral only"):
        export(tmp_path, tmp_path / "model.gguf", "")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"sliding_window": 4096}))
    with pytest.raises(AdapMoEError, match="sliding_window 4096"):
        export(tmp_path, tmp_path / "model.gguf", "")
    assert not (tmp_path / "model.gguf").exists()
