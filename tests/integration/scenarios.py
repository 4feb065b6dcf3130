"""What is asked of an engine and compared between stock vLLM and the plugin."""

import random
from typing import Any

import torch
from vllm import SamplingParams

from vllm_adapmoe.integration.measure.engine import Engine

OUTPUT_TOKENS = 16
CHUNK = 64
"""`max_num_batched_tokens`: prompts longer than this are prefilled in chunks."""
ENGINE_ARGS = {
    "max_model_len": 320,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 16,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": 64 << 20,
}
VLLM_STEPS: dict[str, Any] = {"scheduler": {"enabled": False}}
"""For what is compared to the last bit: a step's requests decide its rounding, and holding back follows the clock."""


def prompts(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of mixed lengths, some several chunks long."""
    generator = random.Random(seed)
    return [
        [generator.randrange(2, vocabulary) for _ in range(generator.choice((5, 17, 40, 90, 200)))]
        for _ in range(count)
    ]


def greedy(**others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True, detokenize=False, **others)


def answers(engine: Engine, asked: list[list[int]], params: SamplingParams) -> list[Any]:
    """Token ids and log probabilities of every output, exactly as the engine gave them."""
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
    return [
        (
            list(output.token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.logprobs or ()],
        )
        for request in outputs
        for output in request.outputs
    ]


def abort_midway(engine: Engine, vocabulary: int) -> list[list[int]]:
    """Eight requests, of which every other is aborted after four steps; the tokens of those that stay."""
    core = engine.llm.llm_engine
    for number, ids in enumerate(prompts(8, vocabulary, seed=5)):
        core.add_request(f"abort-{number}", {"prompt_token_ids": ids}, greedy())
    finished: dict[str, list[int]] = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 4:
            core.abort_request([f"abort-{number}" for number in range(0, 8, 2)])
    return [finished[f"abort-{number}"] for number in range(1, 8, 2)]


def everything(engine: Engine, vocabulary: int) -> dict[str, Any]:
    """Batches of 1, 8 and 16 in chunks, a shared prefix, n>1, log probabilities, aborts, and all of it again."""
    shared = prompts(1, vocabulary, seed=3)[0] + [7] * 130
    params = greedy(logprobs=3)
    result: dict[str, Any] = {
        f"batch of {size}": answers(engine, prompts(size, vocabulary, seed=size), params) for size in (1, 8, 16)
    }
    result["prefix, first"] = answers(engine, [[*shared, 9]], params)
    result["prefix, cached"] = answers(engine, [[*shared, 9], [*shared, 11, 12]], params)
    sampled = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.8, n=3, ignore_eos=True, detokenize=False)
    result["n=3"] = answers(engine, prompts(2, vocabulary, seed=2), sampled)
    result["aborted"] = abort_midway(engine, vocabulary)
    return result


def hidden_states(engine: Engine, ids: list[int]) -> list[torch.Tensor]:
    """Output of every MoE block for one prompt, `[tokens, hidden]` each. Eager engines only."""
    engine.llm.collective_rpc(_record_moe_outputs)
    engine.llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return engine.llm.collective_rpc(_recorded_moe_outputs)[0]


def _record_moe_outputs(worker: Any) -> None:
    from vllm.model_executor.layers.fused_moe import MoERunner

    worker.recorded = []
    for module in worker.model_runner.model.modules():
        if isinstance(module, MoERunner):
            module.register_forward_hook(lambda module, args, output: worker.recorded.append(output.clone()))


def _recorded_moe_outputs(worker: Any) -> list[torch.Tensor]:
    return worker.recorded
