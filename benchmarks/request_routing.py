"""Records the experts of every token of many excerpts, with transformers and without an engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serve_load import domains

SEQUENCES = 16
"""Excerpts in one forward pass."""


@dataclass(frozen=True)
class Routing:
    """Routing of excerpts of several kinds of text; none overlap."""

    kinds: list[str]
    """Name of each kind of text."""
    tokens: list[np.ndarray]
    """Of each kind, token ids, int32 `[excerpts, length]`."""
    experts: list[np.ndarray]
    """Of each kind, the experts of each token, int16 `[excerpts, length, layers, top_k]`."""
    num_experts: int
    """Experts of a layer."""


def record_routing(model: Path, text: Path | None, length: int) -> Routing:
    """Runs each text of a folder through the model, cut into excerpts of `length` tokens; as many of every kind.

    Args:
        model: checkpoint folder of a model whose `config.json` has `num_experts_per_tok` and `num_local_experts`.
        text: folder of `*.txt`, one per kind; None: the bundled held-out text.
        length: tokens of an excerpt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    texts = domains(model, text)
    excerpts = min(len(ids) // length for ids in texts.values())
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    top_k = network.config.num_experts_per_tok
    tokens, experts = [], []
    for ids in texts.values():
        whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        chosen = whole[torch.linspace(0, len(whole) - 1, excerpts).long()]
        routed = []
        with torch.inference_mode():
            for rows in chosen.split(SEQUENCES):
                logits = network(rows, output_router_logits=True).router_logits
                best = [layer.view(*rows.shape, -1).topk(top_k).indices for layer in logits]
                routed.append(torch.stack(best, dim=2).to(torch.int16).numpy())
        tokens.append(chosen.to(torch.int32).numpy())
        experts.append(np.concatenate(routed))
    return Routing(list(texts), tokens, experts, network.config.num_local_experts)
