"""Measures a trained model and writes results.json: losses, load, re-use, and how well the next gate is predicted.

    python examples/tiny_mixtral/measure.py --dense /tmp/dense
    python examples/tiny_mixtral/measure.py --model examples/tiny_qwen3moe/model --dense /tmp/dense --steps 2800

With neither --dense nor --corpus only the loss on the bundled held-out excerpts is printed; that needs no corpus.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOMAINS, documents
from train import BATCH, SEQUENCE, VOCABULARY, encode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HERE = Path(__file__).parent
TOKENS_PER_DOMAIN = 60_000


def loss(model: PreTrainedModel, ids: np.ndarray) -> float:
    """Mean loss in nats per token over sequences of the training length."""
    rows = torch.from_numpy(ids[: len(ids) // SEQUENCE * SEQUENCE].astype(np.int64)).view(-1, SEQUENCE)
    total = 0.0
    with torch.inference_mode():
        for batch in rows.split(BATCH):
            logits = model(batch).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (SEQUENCE - 1))


def unigram_loss(train: np.ndarray, ids: np.ndarray) -> float:
    """Loss of the training tokens' frequencies, each counted once more."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1
    return float(-np.log(counts / counts.sum())[ids].mean())


def routing(model: PreTrainedModel, ids: np.ndarray) -> list[dict[str, float | list[float]]]:
    """Per layer: load of each expert, re-use of the previous token's experts, recall of the next layer's own gate.

    Re-use is the share of a token's top-k experts that the token before it used as well; chance is what independent
    draws with this layer's load would give. Recall is the share of the next layer's experts among the top-k of its
    gate applied to this layer's input.
    """
    top_k = model.config.num_experts_per_tok
    gates = [layer.mlp.gate for layer in model.model.layers]
    inputs: list[torch.Tensor] = []
    width = model.config.hidden_size
    hooks = [
        gate.register_forward_pre_hook(lambda gate, args: inputs.append(args[0].view(-1, width))) for gate in gates
    ]
    rows = torch.from_numpy(ids[: len(ids) // SEQUENCE * SEQUENCE].astype(np.int64)).view(-1, SEQUENCE)
    collected: list[list[torch.Tensor]] = [[] for _ in gates]
    with torch.inference_mode():
        for batch in rows.split(BATCH):
            inputs.clear()
            model(batch)
            for index, tensor in enumerate(inputs):
                collected[index].append(tensor)
    for hook in hooks:
        hook.remove()
    states = [torch.cat(tensors) for tensors in collected]
    chosen = [F.linear(state, gate.weight).topk(top_k).indices for state, gate in zip(states, gates, strict=True)]
    result: list[dict[str, float | list[float]]] = []
    for index, experts in enumerate(chosen):
        used = F.one_hot(experts, gates[0].weight.shape[0]).sum(1).view(-1, SEQUENCE, gates[0].weight.shape[0]).float()
        load = used.mean((0, 1)) / top_k
        row: dict[str, float | list[float]] = {
            "load": [round(share, 4) for share in load.tolist()],
            "reuse": (used[:, 1:] * used[:, :-1]).sum(-1).mean().item() / top_k,
            "reuse_by_chance": (top_k * load.square().sum()).item(),
        }
        if index + 1 < len(gates):
            predicted = F.linear(states[index], gates[index + 1].weight).topk(top_k).indices
            correct = (predicted.unsqueeze(2) == chosen[index + 1].unsqueeze(1)).any(1).float()
            row["next_gate_recall"] = correct.mean().item()
        result.append(row)
    return result


def tokens_of(tokenizer, texts: list[str]) -> np.ndarray:
    ids = [np.array([0, *tokens]) for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return np.concatenate(ids)[:TOKENS_PER_DOMAIN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--dense", type=Path, help="the dense baseline; with it results.json is written")
    parser.add_argument("--steps", type=int, default=1400, help="that the models were trained for, for results.json")
    parser.add_argument("--corpus", action="store_true", help="write results.json without a dense baseline")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/tiny_mixtral"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    bundled = {
        path.stem: loss(model, tokens_of(tokenizer, [path.read_text()]))
        for path in sorted((HERE / "heldout").glob("*.txt"))
    }
    for domain, value in bundled.items():
        print(f"bundled held-out {domain}: {value:.3f} nats/token")
    if args.dense is None and not args.corpus:
        return
    models = {"moe": model}
    if args.dense is not None:
        models["dense"] = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32)
    _, train = encode(args.cache)
    held_out = {
        domain: tokens_of(tokenizer, [text for _, text in documents(domain, held_out=True)]) for domain in DOMAINS
    }
    losses = {
        domain: {name: loss(network, ids) for name, network in models.items()} | {"unigram": unigram_loss(train, ids)}
        for domain, ids in held_out.items()
    }
    mean = {kind: float(np.mean([row[kind] for row in losses.values()])) for kind in (*models, "unigram")}
    result = {
        "command": f"train.py for {args.model.parent.name}; measure.py {' '.join(sys.argv[1:])}",
        "steps": args.steps,
        "tokens": args.steps * BATCH * SEQUENCE,
        "seed": 0,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers")},
        "machine": {"processor": _processor(), "cores_used": 1, "cores": os.cpu_count()},
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in models.items()},
        "held_out_loss_nats_per_token": losses | {"mean": mean},
        "bundled_held_out_loss": bundled,
        "layers": routing(model, np.concatenate([ids[:16_384] for ids in held_out.values()])),
    }
    (args.model.parent / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(mean))
    for index, row in enumerate(result["layers"]):
        print(index, {key: value if isinstance(value, list) else round(value, 3) for key, value in row.items()})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
