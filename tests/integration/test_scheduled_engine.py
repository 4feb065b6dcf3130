"""The scheduler and the expert cache in one real engine: same tokens, fewer bytes, nobody starves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenarios import ENGINE_ARGS, prompts
from tiny_models import VOCABULARY
from vllm.inputs import TokensPrompt

from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

SLOTS = 14
"""Of 24 experts: either half fits, with two to spare."""
SEATS = 4
TOKENS = 12


@pytest.fixture(scope="module")
def two_kinds(tiny_model, tmp_path_factory):
    """A model whose even tokens use the first half of every layer's experts, and odd tokens the other half."""
    source = Path(tiny_model("mixtral"))
    folder = tmp_path_factory.mktemp("two-kinds")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (weights,) = source.glob("*.safetensors")
    tensors = load_file(weights)
    embedding = tensors["model.embed_tokens.weight"]
    direction = torch.zeros(embedding.shape[1], dtype=embedding.dtype)
    direction[0] = 1
    signs = torch.tensor([1.0, -1.0], dtype=embedding.dtype).repeat(len(embedding) // 2).unsqueeze(1)
    tensors["model.embed_tokens.weight"] = embedding + 4 * embedding.std() * 11 * signs * direction
    for name, tensor in tensors.items():
        if name.endswith(".gate.weight") and tensor.shape[0] == 8:
            half = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=tensor.dtype).unsqueeze(1)
            tensors[name] = tensor + half * direction
    save_file(tensors, folder / weights.name, metadata={"format": "pt"})
    return folder


def serve(engine: Engine, kinds: list[int]):
    """Requests of those kinds, all at once; returns their tokens' chances, and their numbers in order of start."""
    core = engine.llm.llm_engine
    begun: list[int] = []
    for number, (kind, ids) in enumerate(zip(kinds, prompts(len(kinds), VOCABULARY // 2 - 2, seed=1), strict=True)):
        forced = [2 * ((7 * number + step) % 200) + 2 + kind for step in range(TOKENS + number % 5)]
        params = engine.params(len(forced), forced, logprobs=2)
        core.add_request(str(number), TokensPrompt(prompt_token_ids=[2 * token + kind for token in ids]), params)
    answers = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if int(output.request_id) not in begun:
                begun.append(int(output.request_id))
            if output.finished:
                answers[output.request_id] = [
                    {token: entry.logprob for token, entry in one.items()} for one in output.outputs[0].logprobs
                ]
    return answers, begun


def assert_same(got, expected, order_differs):
    """The same bits; but with AMX a row's rounding depends on the rows beside it, and so on the order of requests."""
    if not (order_differs and torch.cpu._is_amx_tile_supported()):
        assert got == expected
        return
    assert got.keys() == expected.keys()
    for name, steps in expected.items():
        for ours, theirs in zip(got[name], steps, strict=True):
            assert next(iter(ours)) == next(iter(theirs))  # the forced token comes first
            for token in ours.keys() & theirs.keys():
                assert ours[token] == pytest.approx(theirs[token], abs=0.01)  # 0.0012 seen


def start(model, adapmoe):
    return Engine(
        model, adapmoe, **ENGINE_ARGS | {"max_num_seqs": SEATS}, enforce_eager=True, async_scheduling=False, forced=True
    )


def test_reordering_changes_no_token_saves_bytes_and_starves_nobody(two_kinds):
    """Against stock vLLM, and against vLLM's own order."""
    kinds = [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0] * 2
    with start(two_kinds, None) as engine:
        expected, *_ = serve(engine, kinds)
    fetched = {}
    for name, scheduler in (("ours", {}), ("vllm", {"enabled": False})):
        config = {"cache_experts": SLOTS, "link_gbps": 0.004, "scheduler": scheduler}
        with start(two_kinds, config) as engine:
            scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
            before = engine.cache_stats()["fetched_bytes"]
            got, begun = serve(engine, kinds)
            fetched[name] = engine.cache_stats()["fetched_bytes"] - before
            assert_same(got, expected, order_differs=name == "ours")
            overtakes = [sum(other > number for other in begun[:place]) for place, number in enumerate(begun)]
            if name == "ours":
                assert scheduler.overtakes > 0
                assert 0 < max(overtakes) <= 4 * SEATS + SEATS
            else:
                assert not any(overtakes)
    assert fetched["ours"] < 0.9 * fetched["vllm"], fetched
