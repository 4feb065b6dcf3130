"""Which routers of a model can be predicted, of models that vLLM runs on GPUs only: seen without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adapmoe.integration.worker.routers import Routers

HIDDEN, LATENT, EXPERTS = 64, 32, 8


class Runner(torch.nn.Module):
    """What `Routers` asks of vLLM's `MoERunner` (layers/fused_moe/runner/moe_runner.py of 0.30 to 0.33)."""

    def __init__(self, gate: Any = None, transform: Any = None, **router: Any) -> None:
        super().__init__()
        self.gate, self.routed_input_transform = gate, transform
        self.router = SimpleNamespace(**router)


def block(runner: Runner, **parts: torch.nn.Module) -> torch.nn.Module:
    made = torch.nn.Module()
    made.experts = runner
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def linear(experts: int = EXPERTS, hidden: int = HIDDEN) -> torch.nn.Linear:
    return torch.nn.Linear(hidden, experts, bias=False)


def routers(blocks: list[torch.nn.Module], hidden: int = HIDDEN) -> Routers:
    """Of a model whose layers have other names than its modules."""
    names = [f"language_model.layers.{index}.experts" for index in range(len(blocks))]
    layers: list[Any] = [
        SimpleNamespace(layer_name=name, hidden_size=hidden, moe_config=SimpleNamespace(num_logical_experts=EXPERTS))
        for name in names
    ]
    runners = {name: one.experts for name, one in zip(names, blocks, strict=True)}
    return Routers(layers, torch.nn.ModuleList(blocks), runners)


def tried(made: Routers) -> list[bool]:
    with torch.inference_mode():
        return [made.linear(i, torch.float32, torch.device("cpu")) is not None for i in range(len(made.layers))]


def test_where_a_router_may_be():
    """In the runner, or beside it, as `gate` or as `router`."""
    gate = linear()
    made = routers([block(Runner(gate), gate=gate), block(Runner(), gate=linear()), block(Runner(), router=linear())])
    assert tried(made) == [True] * 3


LATENT_INPUT = {"transform": linear(LATENT)}


@pytest.mark.parametrize(
    ("made", "hidden", "why"),
    [
        (
            block(Runner(**LATENT_INPUT), gate=linear()),
            LATENT,
            "its input differs from the experts' input",
        ),  # Nemotron-H
        (block(Runner(**LATENT_INPUT), gate=linear()), 2 * HIDDEN, "its input differs"),
        (block(Runner(), gate=linear(EXPERTS + 4)), HIDDEN, "Linear: it returns 12 logits for 8 experts"),  # LongCat
        (
            block(Runner(e_score_correction_bias=torch.zeros(12)), gate=linear()),
            HIDDEN,
            "its correction has 12 entries",
        ),
        (block(Runner(_hash_indices_table=torch.zeros(3, 2)), gate=linear()), HIDDEN, "the token's id selects"),
        (block(Runner()), HIDDEN, "the block has no gate or router module"),
    ],
    ids=["latent", "wider than the router", "zero experts", "biases of zero experts", "hash", "elsewhere"],
)
def test_what_cannot_be_foretold(made, hidden, why, caplog):
    model = routers([made], hidden)
    assert tried(model) == [False]
    model.report()
    assert len(caplog.messages) == 1 and why in caplog.messages[0]


def test_one_line_for_all_layers(caplog):
    wrong = [block(Runner(), gate=linear(EXPERTS + 1)) for _ in range(3)]
    made = routers([block(Runner()), *wrong, block(Runner(), gate=linear()), block(Runner())])
    assert tried(made) == [False] * 4 + [True, False]
    made.report()
    assert caplog.messages == [
        "Expert cache: no predictions for MoE layers 0, 5 (the block has no gate or router module); "
        "1 to 3 (Linear: it returns 9 logits for 8 experts)"
    ]


def test_nothing_to_say_where_all_are_linear(caplog):
    made = routers([block(Runner(linear()))])
    assert tried(made) == [True]
    made.report()
    assert not caplog.messages
