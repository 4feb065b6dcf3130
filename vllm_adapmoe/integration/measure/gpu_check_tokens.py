"""Runs one engine of the GPU check in its own process, to compare its tokens with other engines'.

    python -m vllm_adapmoe.integration.measure.gpu_check_tokens SPEC

SPEC is JSON with the fields of `Spec`; the result is a line with `gpu_check.MARK` and JSON. Steps hold equal requests
in every engine, because the core runs in this process and a batch is queued before its first step.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

import torch
from vllm.inputs import TokensPrompt
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_adapmoe.integration.layers.mapped_experts import kernel_of
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.measure.gpu_check import MARK, device_arguments

MAX_SEQUENCES = 8
KV_CACHE_BYTES = 64 << 20
REPEATS = 3
"""Further runs of the batch by stock vLLM, to see whether it gives the same answers each time."""


@dataclass(frozen=True)
class Spec:
    """Input of one run."""

    model: str
    """Folder of the checkpoint."""
    prompts: list[list[int]]
    tokens: int
    """Output tokens of every request."""
    device_bytes: int
    """Device memory that the engine may use in total."""
    adapmoe: dict[str, Any] | None = None
    """Configuration of the expert cache; None: stock vLLM."""
    arguments: dict[str, Any] | None = None
    """Further arguments of `LLM`."""
    forced: list[list[int]] | None = None
    """Outputs to force, one per prompt, after the free runs; None: none."""
    noise: float | None = None
    """Forces the engine's own outputs without and with this relative noise on MoE layers (`_add_noise`); None: not."""


def main() -> None:
    """Runs the spec, and prints the results."""
    spec = Spec(**json.loads(sys.argv[1]))
    length = max(map(len, spec.prompts)) + spec.tokens
    arguments = {"max_model_len": length, "max_num_seqs": MAX_SEQUENCES, "max_num_batched_tokens": 2048}
    arguments |= {"kv_cache_memory_bytes": KV_CACHE_BYTES} | device_arguments(spec.device_bytes)
    with Engine(spec.model, spec.adapmoe, forced=True, **(arguments | (spec.arguments or {}))) as engine:
        config = engine.llm.llm_engine.vllm_config
        results: dict[str, Any] = {
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "graphs": str(config.compilation_config.cudagraph_mode),
            "kernels": engine.llm.collective_rpc(_kernels)[0],
            "on_device": engine.llm.collective_rpc(_decides_on_device)[0],
            "alone": [_answers(engine, [prompt], spec.tokens)[0] for prompt in spec.prompts],
            "together": _answers(engine, spec.prompts, spec.tokens),
        }
        again = [_answers(engine, spec.prompts, spec.tokens) for _ in range(REPEATS if spec.adapmoe is None else 0)]
        results["repeats"] = all(answers == results["together"] for answers in again)
        if spec.forced is not None:
            results["forced"] = _forced(engine, spec.prompts, spec.forced)
            results["forced_again"] = _forced(engine, spec.prompts, spec.forced)
        if spec.noise is not None:
            answers = [tokens for tokens, _ in results["alone"]]
            results["forced"] = _forced(engine, spec.prompts, answers)
            engine.llm.collective_rpc(_add_noise, args=(spec.noise,))
            results["noisy"] = _forced(engine, spec.prompts, answers)
        results["cache"] = engine.cache_stats()
    print(f"\n{MARK}{json.dumps(results)}", flush=True)


def _answers(
    engine: Engine, prompts: list[list[int]], tokens: int, forced: list[list[int]] | None = None
) -> list[tuple[list[int], list[list[float]]]]:
    """Runs all prompts in one batch; returns tokens and steps of each.

    A step is the token's log probability, that of the most probable token, and that token.
    """
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        [
            engine.params(tokens, None if forced is None else forced[n], logprobs=1, flat_logprobs=True)
            for n in range(len(prompts))
        ],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        flat: Any = output.outputs[0].logprobs
        steps = [[flat.logprobs[at], flat.logprobs[at + 1], flat.token_ids[at + 1]] for at in flat.start_indices]
        answers.append((list(output.outputs[0].token_ids), steps))
    return answers


def _forced(engine: Engine, prompts: list[list[int]], answers: list[list[int]]) -> list[Any]:
    """Returns `_answers` of each prompt alone, with its output forced."""
    return [
        _answers(engine, [prompt], len(answer), [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _kernels(worker: Any) -> list[str]:
    """Returns the class names of the kernels that the worker's MoE layers run."""
    modules = worker.model_runner.get_model().modules()
    return sorted({type(kernel_of(module)).__name__ for module in modules if isinstance(module, RoutedExperts)})


def _decides_on_device(worker: Any) -> bool:
    """Returns whether the GPU decides in decode steps which experts to load; not so in stock vLLM."""
    steps = getattr(worker, "gpu_steps", None)
    return steps is not None and steps.decode is not None


def _add_noise(worker: Any, relative: float) -> None:
    """Adds random noise to every MoE layer's output. Eager engines only.

    Moves every value up or down by `relative` times the greater of itself and its row's root mean square.
    """
    generator = torch.Generator().manual_seed(0)

    def move(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        value = output.float()
        size = torch.maximum(value.abs(), value.square().mean(-1, keepdim=True).sqrt())
        signs = torch.randn(value.shape, generator=generator).sign().to(value.device)
        return (value + relative * size * signs).to(output.dtype)

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, MoERunner):
            module.register_forward_hook(move)


if __name__ == "__main__":
    main()
