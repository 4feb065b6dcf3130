"""Compares predictors of the next tokens' experts as eviction policies, by replay.

Each candidate predicts, from the state of a layer at the current token, the probability that the layer's next event
uses each expert. It is fitted on one text and replayed on another, with half the experts resident: half of the eviction
score is the prediction, and half recent use (`vllm_adapmoe.policy.eviction.NextToken`).

    python -m examples.eviction_candidates examples/tiny_mixtral/model --fit examples/tiny_mixtral/calibration \
        --replay examples/tiny_mixtral/heldout -o examples/benchmarks/candidates_tiny_mixtral.json
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.workload import prompts_of
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.chances import chance_of_any
from vllm_adapmoe.profile.next_token import HeadFit
from vllm_adapmoe.results import write
from vllm_adapmoe.simulate.replay import belady, replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo

RESIDENT = 0.5
FADE = 0.05
"""Fade of a request's own history: that of the slow mean in `NextUse`."""


@dataclass
class Routing:
    """Routing of one sequence, layer by layer."""

    inputs: torch.Tensor
    """Inputs of each layer's gate, float32 `[layers, tokens, hidden]`."""
    scores: torch.Tensor
    """Softmax of each gate's logits, float32 `[layers, tokens, experts]`."""
    last: torch.Tensor
    """Last hidden states, float32 `[tokens, hidden]`."""
    top_k: int

    @property
    def used(self) -> torch.Tensor:
        """Experts used, float32 `[layers, tokens, experts]`: 1 if used."""
        return torch.zeros_like(self.scores).scatter_(-1, self.scores.topk(self.top_k, -1).indices, 1.0)


def watch(model: Path, sequences: list[list[int]], action: str) -> Iterator[Routing]:
    """Runs the model and yields the inputs and scores of its gates for each sequence."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    gates = [block for name, block in network.named_modules() if name.endswith(("mlp.gate", "block_sparse_moe.gate"))]
    gate_inputs: list[torch.Tensor] = []
    for gate in gates:
        gate.register_forward_pre_hook(lambda _, inputs: gate_inputs.append(inputs[0].flatten(0, -2)))
    for ids in tqdm(sequences, desc=action, unit="sequence"):
        gate_inputs.clear()
        with torch.inference_mode():
            last = network(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        logits = torch.stack([inputs @ gate.weight.T for inputs, gate in zip(gate_inputs, gates, strict=True)])
        yield Routing(torch.stack(gate_inputs), logits.softmax(-1), last, network.config.num_experts_per_tok)


def _before(states: torch.Tensor) -> torch.Tensor:
    """Returns the state of each token's predecessor."""
    return torch.cat([torch.zeros_like(states[:1]), states[:-1]])


FEATURES = {
    "the same layer's experts (transitions)": lambda routing, layer: routing.used[layer],
    "the last hidden state of the token before": lambda routing, layer: _before(routing.last),
    "the layer's input (next-token heads)": lambda routing, layer: routing.inputs[layer],
    "the layer's input and experts": lambda routing, layer: torch.cat([routing.inputs[layer], routing.used[layer]], 1),
}
"""Features by candidate, `[tokens, features]`: a linear map is fitted from them to the experts the next token uses."""


def fit(sequences: Iterator[Routing]) -> dict[str, list[np.ndarray]]:
    """Fits a head for each layer, by candidate."""
    fits: dict[str, list[HeadFit]] = {}
    for routing in sequences:
        for name, feature in FEATURES.items():
            for layer in range(len(routing.inputs)):
                x, used = feature(routing, layer)[1:-1], routing.used[layer, 2:]
                heads = fits.setdefault(name, [])
                if len(heads) == layer:
                    heads.append(HeadFit(x.shape[1], used.shape[1]))
                heads[layer].add(x, used)
    return {name: [head.solve() for head in heads] for name, heads in fits.items()}


def chances(routing: Routing, heads: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the probability by candidate that the next token uses each expert, `[layers, tokens, experts]`."""
    used = routing.used.numpy()
    history = np.full(used.shape, routing.top_k / used.shape[2])
    for token in range(1, used.shape[1]):
        history[:, token] = (1 - FADE) * history[:, token - 1] + FADE * used[:, token]
    result = {
        "the request's own recent use": history,
        "the router's scores of this token": np.minimum(routing.top_k * routing.scores.numpy(), 1),
    }
    for name, weights in heads.items():
        features = [FEATURES[name](routing, layer).numpy() for layer in range(len(used))]
        result[name] = np.stack([x @ head[:-1] + head[-1] for x, head in zip(features, weights, strict=True)])
    best = result["the layer's input (next-token heads)"]
    result["next-token heads and the request's own use, blended"] = (best + history) / 2
    return result


def steps_of(batch: list[Routing], predicted: list[np.ndarray] | None) -> list[Step]:
    """Returns the steps of decoding the sequences together, one token of each per step."""
    ids = np.stack(
        [routing.scores.topk(routing.top_k, -1).indices.numpy() for routing in batch], 2
    )  # layers, tokens, rows, k
    steps = []
    for token in range(ids.shape[1]):
        expected = {}
        if predicted is not None:
            expected = {
                layer: chance_of_any(np.stack([chance[layer, token] for chance in predicted]))
                for layer in range(len(ids))
            }
        names = [str(row) for row in range(len(batch))]
        used = ids[:, token].astype(np.int64)
        positions = np.full(len(batch), token, dtype=np.int32)
        steps.append(Step(0.0, names, positions, used, np.ones(used.shape, np.float16), {}, expected))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder of a model that transformers runs")
    parser.add_argument("--fit", type=Path, required=True, help="folder of *.txt to fit on")
    parser.add_argument("--replay", type=Path, required=True, help="folder of *.txt to replay")
    parser.add_argument("--output", "-o", type=Path, required=True, help="JSON file for the result")
    args = parser.parse_args()
    heads = fit(watch(args.model, prompts_of(args.model, args.fit, 192, 256), "Fitting"))
    sequences = list(watch(args.model, prompts_of(args.model, args.replay, 32, 80), "Watching"))
    predicted = [chances(routing, heads) for routing in sequences]
    layers, _, experts = sequences[0].scores.shape
    info = TraceInfo(str(args.model), [experts] * layers, sequences[0].top_k, 0, [1] * layers, [0] * layers)
    slots = [round(RESIDENT * layers * experts)]
    points = []
    table = Table(title=f"{args.model}: loads over Belady's, half of the experts resident")
    for column in ("predictor", "batch 1", "batch 8"):
        table.add_column(column, justify="left" if column == "predictor" else "right")
    names = ["lru", "next_use", *predicted[0]]
    for name in tqdm(names, desc="Replaying", unit="candidate"):
        point: dict[str, Any] = {"predictor": name}
        for batch in (1, 8):
            groups = range(0, len(sequences), batch)
            policy = name if name in ("lru", "next_use") else "next_token"
            steps = [
                step
                for start in groups
                for step in steps_of(
                    sequences[start : start + batch],
                    [chance[name] for chance in predicted[start : start + batch]] if policy == "next_token" else None,
                )
            ]
            loads = replay(info, steps, CacheSetup(slots, policy)).demand_loads
            point[f"batch_{batch}"] = {"loads": loads, "of_belady": loads / int(belady(info, steps, slots).sum())}
        points.append(point)
        table.add_row(name, *(f"{point[f'batch_{batch}']['of_belady']:.2f}" for batch in (1, 8)))
    Console().print(table)
    write(args.output, {"simulation": "eviction candidates", "resident": RESIDENT, "points": points})


if __name__ == "__main__":
    main()
