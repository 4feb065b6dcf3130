"""The scheduler and the expert cache in one real engine: same tokens, fewer bytes, nobody starves."""

import time
from itertools import pairwise
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
DELAY = 1.0
TOKENS = 40


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


def serve(engine: Engine, kinds: list[int], apart: int = 3):
    """Requests of those kinds, `apart` steps one after the other.

    Returns their tokens, their tokens' times, and the seconds of the longest step.
    """
    core = engine.llm.llm_engine
    coming = []
    for number, (kind, ids) in enumerate(zip(kinds, prompts(len(kinds), VOCABULARY // 2 - 2, seed=1), strict=True)):
        forced = [2 * ((7 * number + step) % 200) + 2 + kind for step in range(TOKENS)]
        params = engine.params(TOKENS, forced, logprobs=2)
        coming.append((f"request-{number}", [2 * token + kind for token in ids], params))
    times: dict[str, list[float]] = {name: [] for name, _, _ in coming}
    answers, step, longest = {}, 0, 0.0
    while coming or core.has_unfinished_requests():
        if coming and step % apart == 0:
            name, ids, params = coming.pop(0)
            core.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
        begin = time.monotonic()
        outputs = core.step()
        longest = max(longest, time.monotonic() - begin)
        for output in outputs:
            times[output.request_id] += [time.monotonic()] * (
                len(output.outputs[0].token_ids) - len(times[output.request_id])
            )
            if output.finished:
                answers[output.request_id] = [
                    {token: entry.logprob for token, entry in one.items()} for one in output.outputs[0].logprobs
                ]
        step += 1
    return answers, times, longest


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
    return Engine(model, adapmoe, **ENGINE_ARGS, enforce_eager=True, async_scheduling=False, forced=True)


def test_holding_back_changes_no_token_saves_bytes_and_starves_nobody(two_kinds):
    """Against stock vLLM, and against vLLM's own order."""
    kinds = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    with start(two_kinds, None) as engine:
        expected, *_ = serve(engine, kinds)
    fetched = {}
    for name, scheduler in (
        ("held", {"max_prefill_delay_ms": 1000 * DELAY, "max_affinity_delay_ms": 1000 * DELAY}),
        ("vllm", {"enabled": False}),
    ):
        config = {"cache_experts": SLOTS, "link_gbps": 0.004, "scheduler": scheduler}
        with start(two_kinds, config) as engine:
            scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
            before = engine.cache_stats()["fetched_bytes"]
            got, times, longest_step = serve(engine, kinds)
            fetched[name] = engine.cache_stats()["fetched_bytes"] - before
            assert_same(got, expected, order_differs=name == "held")
            if name == "held":
                assert scheduler.held_tokens > 0
                assert scheduler.held_prefill_steps > 0
                longest = max(after - before for one in times.values() for before, after in pairwise(one))
                assert longest < DELAY + 5 * longest_step
    assert fetched["held"] < 0.9 * fetched["vllm"]  # 0.82 seen
