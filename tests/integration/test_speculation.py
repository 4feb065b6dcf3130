"""Speculative decoding: tokens and drafts of stock vLLM, whatever is cached; rows of verification are no prompts."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_MIXTRAL
from scenarios import ENGINE_ARGS
from tiny_drafters import HIDDEN, save_deepseek_mtp, save_dense, save_eagle, save_glm_mtp, save_qwen_next_mtp
from tiny_models import VOCABULARY

from tests.apart import apart
from vllm_adapmoe.calibrate.text import read_sequences
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.loading.slot_pools import SlotPools
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.simulate.trace_file import read_trace

pytestmark = pytest.mark.engine

HELDOUT = ROOT / "examples" / "tiny_mixtral" / "heldout"
PROFILE = str(ROOT / "configs" / "tiny_mixtral.json")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
TOKENS = 48
PROMPTS = [[7, 3, 9, 4, 100, 8] * 2, [11, 12, 13] * 4, list(range(20, 60))]


def engine(model: Path, speculative: dict[str, Any] | None, adapmoe: dict[str, Any] | None, **arguments: Any) -> Engine:
    return Engine(
        model, adapmoe, **(ENGINE_ARGS | {"enforce_eager": True, "speculative_config": speculative} | arguments)
    )


def record_drafts(worker: Any) -> None:
    """Records what is drafted in every step."""
    runner = worker.model_runner
    propose, worker.drafts = runner.propose_draft_token_ids, []

    def proposed(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        worker.drafts.append([list(row) for row in (drafts if isinstance(drafts, list) else drafts.tolist())])
        return drafts

    runner.propose_draft_token_ids = proposed


def run(running: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[Any], float]:
    """Tokens, drafts of every step, and the number of accepted ones."""
    running.llm.collective_rpc(record_drafts)
    tokens = running.generate(prompts, TOKENS).tokens
    (drafts,) = running.llm.collective_rpc(lambda worker: worker.drafts)
    metrics = {metric.name: metric for metric in running.llm.get_metrics()}
    return tokens, drafts, metrics["vllm:spec_decode_num_accepted_tokens"].value


def watch_steps(worker: Any) -> None:
    """Records of every step its rows and drafts by request, and the prompt tokens that the planner is told of."""
    step, cache, worker.watched = worker.current_step, worker.expert_cache, []
    prefetch = cache.prefetch_first_layers

    def watched(prompt_tokens: int, chances: Any) -> None:
        drafts = {name: len(tokens) for name, tokens in step.drafts.items()}
        worker.watched.append((dict(step.rows), drafts, prompt_tokens))
        prefetch(prompt_tokens, chances)

    cache.prefetch_first_layers = watched


def in_own_process(function: Any, *args: Any) -> Any:
    """Calls the function in a new process: after n-gram drafting, which uses numba, vLLM starts no other engine."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Text, of which a trained model repeats parts."""
    return read_sequences(TINY_MIXTRAL, HELDOUT, 64, 4, seed=4)


def ngram_of_stock(texts: list[list[int]]) -> Any:
    with engine(TINY_MIXTRAL, NGRAM, None) as stock:
        return run(stock, texts)


def ngram_of_ours(texts: list[list[int]], config: dict[str, Any]) -> Any:
    with engine(TINY_MIXTRAL, NGRAM, config) as ours:
        ours.llm.collective_rpc(watch_steps)
        result = run(ours, texts)
        (steps,) = ours.llm.collective_rpc(lambda worker: worker.watched)
        return result, steps, ours.cache_stats()


@pytest.fixture(scope="module")
def expected(texts):
    return in_own_process(ngram_of_stock, texts)


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_ngram_gives_stock_tokens_and_its_rows_are_no_prompts(texts, expected, fraction, tmp_path):
    """With prefetch, the scheduler that knows the cache, next-token heads and a trace."""
    config = {"cache_fraction": fraction, "profile": PROFILE, "trace_out": str(tmp_path / "trace")}
    (tokens, _, accepted), steps, stats = in_own_process(ngram_of_ours, texts, config)
    assert tokens == expected[0]
    assert accepted == expected[2] > TOKENS / 4
    assert stats["misses"] > 0 and stats["prefetches"] > 0
    assert sum(bool(drafts) for _, drafts, _ in steps) > 10
    for rows, drafts, prompt_tokens in steps:
        assert prompt_tokens == sum(count for name, count in rows.items() if count > 1 + drafts.get(name, 0))
    _, traced = read_trace(tmp_path / "trace")
    assert [step.prompt_tokens for step in traced] == [prompt_tokens for *_, prompt_tokens in steps]
    assert [0 if step.drafted is None else int(step.drafted.sum()) for step in traced] == [
        sum(drafts.values()) for _, drafts, _ in steps
    ]


def record_budget(worker: Any) -> None:
    """Records the tokens that the loss budget is told of, with the rows and drafts of the step."""
    budget, step, worker.spent = worker.gating._budget, worker.current_step, []
    spend = budget.spend

    def spent(nats: float, tokens: int) -> float:
        worker.spent.append((tokens, dict(step.rows), {name: len(drafts) for name, drafts in step.drafts.items()}))
        return spend(nats, tokens)

    budget.spend = spent


def one_by_one(texts: list[list[int]], gating: dict[str, Any]) -> Any:
    """Statistics and what was spent, with one request at a time: all rows of a step are its own."""
    config = {"cache_fraction": 0.5, "profile": PROFILE, "gating": gating}
    with engine(TINY_MIXTRAL, NGRAM, config) as ours:
        if gating["mode"] == "batch":
            ours.llm.collective_rpc(record_budget)
        tokens = [ours.generate([text], TOKENS).tokens[0] for text in texts]
        spent = ours.llm.collective_rpc(lambda worker: worker.spent)[0] if gating["mode"] == "batch" else []
        return tokens, spent, ours.cache_stats()


def test_gating_by_batch_is_an_expert_budget_of_the_rows_that_verify(texts):
    """An expert is dropped for all rows of a request or for none, and every row is a token to the loss budget."""
    *_, off = in_own_process(one_by_one, texts, {"mode": "off"})
    tokens, spent, stats = in_own_process(one_by_one, texts, {"mode": "batch", "max_loss_increase": 0.01})
    assert sum(bool(drafts) for *_, drafts in spent) > 10, "steps that verify spend the budget, too"
    for count, rows, drafts in spent:
        assert count == sum(1 + drafts.get(name, 0) for name in rows)
    prompts = sum(map(len, texts))
    assert stats["gated_tokens"] == 12 * (prompts + sum(count for count, *_ in spent))
    assert all(len(answer) == TOKENS for answer in tokens)
    assert stats["kept_experts"] < 2 * stats["gated_tokens"]
    loads = [one["demand_loads"] / (one["hits"] + one["misses"]) for one in (stats, off)]
    assert loads[0] < 0.9 * loads[1]


DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("mixtral", {"method": "draft_model", "num_speculative_tokens": 3}),
    "moe": ("mixtral", {"method": "draft_model", "num_speculative_tokens": 3}),
    "eagle": ("mixtral", {"method": "eagle", "num_speculative_tokens": 2}),
    "eagle3": ("qwen3_moe", {"method": "eagle3", "num_speculative_tokens": 2}),
    "deepseek mtp": ("", {"method": "mtp", "num_speculative_tokens": 2}),
    "glm mtp": ("", {"method": "mtp", "num_speculative_tokens": 1}),
    "qwen next mtp": ("", {"method": "mtp", "num_speculative_tokens": 2}),
}
"""Target, if it is one of `tiny_models`, and settings of each kind of draft model."""
MTP = {"deepseek mtp": save_deepseek_mtp, "glm mtp": save_glm_mtp, "qwen next mtp": save_qwen_next_mtp}


def models_of(name: str, tiny_model: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    target, settings = DRAFTERS[name]
    if name in MTP:
        return apart(MTP[name], folder / "mtp"), settings
    if name == "moe":
        return tiny_model(target), settings | {"model": str(tiny_model(target))}
    if name == "dense":
        return tiny_model(target), settings | {"model": str(apart(save_dense, folder / "draft"))}
    return tiny_model(target), settings | {"model": str(apart(save_eagle, folder / "draft", name == "eagle3"))}


def expert_layers(worker: Any) -> tuple[int, int]:
    """Number of layers in the cache, and of stock layers in the draft model."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    drafter = worker.model_runner.drafter.model
    stock = [part for part in drafter.modules() if type(part) is RoutedExperts]
    assert all(layer.w2_weight.numel() for layer in stock)
    return len(worker.moe_layers), len(stock)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_draft_model_drafts_as_in_stock_vllm(name, tiny_model, tmp_path, monkeypatch):
    count, counted = SlotPools.count_drafter, []

    def count_drafter(pools: SlotPools, nbytes: int) -> None:
        counted.append((pools.memory.draft_model, nbytes))
        count(pools, nbytes)

    monkeypatch.setattr(SlotPools, "count_drafter", count_drafter)
    model, speculative = models_of(name, tiny_model, tmp_path)
    # With a prefix cache stock vLLM copies the state of linear attention by a Triton kernel, which the CPU lacks.
    arguments = {"enable_prefix_caching": name != "qwen next mtp"}
    with engine(model, speculative, None, **arguments) as stock:
        expected = run(stock, PROMPTS)
    configs: list[dict[str, Any]] = [{"store": "host", "scheduler": {"enabled": False}}]
    if name in ("moe", "deepseek mtp"):
        configs.append({"store": "file"})
    for config in configs:
        with engine(model, speculative, config | {"cache_fraction": 0.5}, **arguments) as ours:
            tokens, drafts, accepted = run(ours, PROMPTS)
            stats = ours.cache_stats()
            cached, stock_layers = ours.llm.collective_rpc(expert_layers)[0]
        assert tokens == expected[0]
        if config["store"] == "host":  # the scheduler that knows the cache may put requests into other steps
            assert drafts == expected[1] and accepted == expected[2]
        assert stats["misses"] > 0
        estimated, nbytes = counted.pop()
        if "model" in speculative:  # the bytes of its checkpoint, which lacks embeddings for EAGLE
            shared = name.startswith("eagle") * VOCABULARY * HIDDEN * 2
            assert nbytes == pytest.approx(estimated + shared, abs=20_000)  # the header
        else:
            assert nbytes / 2 < estimated < 2 * nbytes
        assert cached == {"qwen next mtp": 4, "deepseek mtp": 2, "glm mtp": 2}.get(name, 3)
        assert stock_layers == {"dense": 0, "eagle": 0, "eagle3": 0, "moe": 3}.get(name, 1)
    if name == "moe":  # it drafts what the target, which it is, outputs
        assert expected[2] > 2 * TOKENS


def test_what_has_not_been_compared_is_refused(tiny_model):
    speculative = {"method": "medusa", "model": str(tiny_model("mixtral")), "num_speculative_tokens": 2}
    with pytest.raises(AdapMoEError, match=r"speculative_config method='medusa' .* use one of draft_model, eagle"):
        engine(tiny_model("mixtral"), speculative, {"cache_fraction": 0.5})
