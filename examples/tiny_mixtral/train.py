"""Trains the bundled tiny mixture-of-experts models, or the dense baseline, on text that the machine has.

    python examples/tiny_mixtral/train.py mixtral --output examples/tiny_mixtral/model
    python examples/tiny_mixtral/train.py mixtral-dense --output /tmp/mixtral-dense
    python examples/tiny_mixtral/train.py qwen3moe --steps 2800 --output examples/tiny_qwen3moe/model

Fixed seeds; about an hour each on one core. `measure.py` then measures both and writes results.json.
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOMAINS, documents
from tokenizer import train_tokenizer
from transformers import (
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 2048
SEQUENCE = 256
BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 80
Z_LOSS = 1e-4
"""Weight of the router-logit loss, per layer."""
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def build(kind: str) -> PreTrainedModel:
    """A mixture of experts, or the dense model that spends the same compute on a token.

    `qwen3moe` has many small experts, as recent models have, in less than 20 MB of bf16: 128 a layer, of 32 columns.
    """
    torch.manual_seed(0)
    if kind == "mixtral":
        experts = {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**SHAPE, **experts))
    if kind == "mixtral-dense":
        return MistralForCausalLM(MistralConfig(**SHAPE, intermediate_size=512))
    shape = SHAPE | {"num_hidden_layers": 7, "hidden_size": 96}
    if kind == "qwen3moe-dense":
        return Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=256))
    experts = {"moe_intermediate_size": 32, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, intermediate_size=256))


def encode(cache: Path) -> tuple[Path, np.ndarray]:
    """Tokenizer folder and the training tokens, uint16, documents in a fixed random order, each after a BOS.

    The tokenizer is tiny_mixtral's, that all models and excerpts share, or a new one where there is none yet.
    """
    folder, tokens = cache / "tokenizer", cache / "train.npy"
    if not tokens.is_file():
        texts = [text for domain in DOMAINS for _, text in documents(domain, held_out=False)]
        np.random.default_rng(0).shuffle(texts)
        bundled = Path(__file__).parent / "model"
        if (bundled / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(bundled)
        else:
            tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 2000)], VOCABULARY)
        tokenizer.save_pretrained(folder)
        ids = [
            np.array([0, *tokens], dtype=np.uint16)
            for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        np.save(tokens, np.concatenate(ids))
    return folder, np.load(tokens)


def router_losses(router_logits: tuple[torch.Tensor, ...], top_k: int, balance_weight: float) -> torch.Tensor:
    """Sum over layers of the load-balancing loss (Switch Transformer, eq. 4) and the z-loss (ST-MoE, eq. 5).

    Args:
        router_logits: per layer `[tokens, experts]`.
        balance_weight: of the load-balancing loss.
    """
    total = torch.zeros(())
    for logits in router_logits:
        logits = logits.float()
        experts = logits.shape[-1]
        probabilities = logits.softmax(-1)
        chosen = F.one_hot(probabilities.topk(top_k).indices, experts).sum(1).float()
        balance = experts * (chosen.mean(0) * probabilities.mean(0)).sum() / top_k
        total = total + balance_weight * balance + Z_LOSS * logits.logsumexp(-1).square().mean()
    return total


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def train(kind: str, tokens: np.ndarray, steps: int, balance_weight: float, save_every: int, save) -> PreTrainedModel:
    model = build(kind)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    sequences = tokens[: len(tokens) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
    order = np.random.default_rng(1).permutation(len(sequences))
    start = time.time()
    for step in range(steps):
        rows = order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        batch = torch.from_numpy(sequences[rows].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch) if kind.endswith("dense") else model(batch, output_router_logits=True)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        total = loss
        if not kind.endswith("dense"):
            total = loss + router_losses(output.router_logits, model.config.num_experts_per_tok, balance_weight)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step + 1) * BATCH * SEQUENCE / (time.time() - start)
            print(f"step {step}/{steps} loss {loss.item():.3f} tokens/s {rate:.0f}", flush=True)
        if save_every and step and step % save_every == 0:
            save(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("mixtral", "mixtral-dense", "qwen3moe", "qwen3moe-dense"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss, per layer")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/tiny_mixtral"), help="tokens and tokenizer")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    folder, tokens = encode(args.cache)
    print(f"{len(tokens)} training tokens, {args.steps * BATCH * SEQUENCE} of them used", flush=True)

    def save(model: PreTrainedModel) -> None:
        """Writes the checkpoint in bf16, atomically."""
        temporary = args.output.with_name(args.output.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        copy = build(args.kind).to(torch.bfloat16)
        copy.load_state_dict(state)
        copy.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(folder).save_pretrained(temporary)
        shutil.rmtree(args.output, ignore_errors=True)
        temporary.rename(args.output)

    save(train(args.kind, tokens, args.steps, args.balance, args.save_every, save))


if __name__ == "__main__":
    main()
