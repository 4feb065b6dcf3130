"""Serves one architecture's tiny checkpoint with stock vLLM, half resident and with the fewest slots."""

import json
import math
import os
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

PROMPT_LENGTHS = (5, 40, 90, 150)
"""The last two are longer than a step's tokens, and than several KV blocks."""
OUTPUT_TOKENS = 12


def run_one(architecture: str, kind: str, folder: Path, result: Path) -> None:
    """Writes what came out to `result` after each step, so that it survives a crash.

    Steps: `checkpoint`, `stock`, `half`, `fewest`; each has an `error`, or what was found.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all requests are there before the first step, in every engine
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    told: dict[str, Any] = {}

    def tell(step: str, **what: Any) -> None:
        told[step] = what
        result.write_text(json.dumps(told))

    from tests.models.checkpoint import save_checkpoint
    from tests.models.families import CannotMake

    model = folder / "model"
    tell("checkpoint", error="ended without a word")
    try:
        save_checkpoint(architecture, model)
    except CannotMake as error:
        return tell("checkpoint", cannot=str(error))
    except Exception as error:
        return tell("checkpoint", error=one_line(error))
    tell("checkpoint", mib=round(sum(file.stat().st_size for file in model.rglob("*")) / 2**20, 1))
    answers: dict[str, list[Any]] = {}
    fewest = 1.0
    for step in ("stock", "half", "fewest"):
        tell(step, error="ended without a word")
        began = time.monotonic()
        try:
            with start(model, {"stock": None, "half": 0.5, "fewest": fewest}[step], kind) as engine:
                answers[step] = ask(engine)
                layers = engine.llm.collective_rpc(expert_layers)[0]
                counted = engine.cache_stats()
                if step == "half":
                    sum_by_pairs(engine, len(layers))
                    answers["pairs"] = ask(engine)
        except BaseException as error:
            traceback.print_exc()
            tell(step, error=one_line(error))
            if step == "stock":
                return None
            continue
        facts: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if step == "stock":
            if any(math.isnan(chance) for one in answers[step] for chance in one["prompt"]):
                return tell(step, error="its log probabilities are not numbers: there is nothing to compare with")
            facts |= {"layers": len(layers)}
            if not layers:
                return tell(step, **facts)
            facts |= {"experts": max(layer[0] for layer in layers), "top_k": max(layer[1] for layer in layers)}
            fewest = least_fraction(layers)
        else:
            facts |= {name: counted[name] for name in ("slots", "misses", "prefetches") if name in counted}
            facts["stock"] = compare(answers["stock"], answers[step])
            if "pairs" in answers:
                facts["pairs"] = compare(answers["pairs"], answers[step])
        tell(step, **facts)
    return None


def start(model: Path, fraction: float | None, kind: str) -> Any:
    """An engine with this share of the experts resident; None: stock vLLM."""
    from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS
    from vllm_adapmoe.integration.measure.engine import Engine

    args = ENGINE_ARGS | {"enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 8}
    if kind == "multimodal":
        args["language_model_only"] = True  # the prompts are text; without it a processor is asked for
    if kind == "token classification":
        args["max_num_batched_tokens"] = args["max_model_len"]  # vLLM waits forever with a prompt that needs two steps
    return Engine(model, None if fraction is None else VLLM_STEPS | {"cache_fraction": fraction}, **args)


def sum_by_pairs(engine: Any, layers: int) -> None:
    """Makes the engine run pairs of token and expert, as it does where a step needs several waves: drops none."""
    engine.call("set_gating", {"rule": "token", "threshold": 0.0, "sensitivity": [1.0] * layers})


def ask(engine: Any) -> list[Any]:
    """For each prompt: tokens, log probabilities of the answer's and of the prompt's tokens."""
    import random

    from vllm import SamplingParams

    generator = random.Random(1)
    prompts = [[generator.randrange(2, 480) for _ in range(length)] for length in PROMPT_LENGTHS]
    params = SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True, detokenize=False, logprobs=1, prompt_logprobs=0
    )
    if engine.llm.llm_engine.vllm_config.model_config.runner_type == "pooling":
        return vectors(engine, prompts)
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        {
            "tokens": list(request.outputs[0].token_ids),
            "logprobs": [{t: entry.logprob for t, entry in step.items()} for step in request.outputs[0].logprobs],
            "prompt": [
                step[token].logprob
                for token, step in zip(request.prompt_token_ids, request.prompt_logprobs, strict=True)
                if step is not None
            ],
        }
        for request in outputs
    ]


def vectors(engine: Any, prompts: list[list[int]]) -> list[Any]:
    """What a pooling model gives for each prompt, in the place of log probabilities."""
    tasks = ("classify", "embed", "token_classify", "token_embed")
    task = next(task for task in tasks if task in engine.llm.supported_tasks)
    outputs = engine.llm.encode([{"prompt_token_ids": ids} for ids in prompts], pooling_task=task, use_tqdm=False)
    return [{"tokens": [], "logprobs": [], "prompt": one.outputs.data.float().flatten().tolist()} for one in outputs]


def expert_layers(worker: Any) -> list[tuple[int, int, int]]:
    """Experts, top-k and bytes of an expert, of every layer of routed experts."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layers = [module for module in worker.model_runner.model.modules() if isinstance(module, RoutedExperts)]
    return [
        (layer.local_num_experts, layer.top_k, sum(p.nbytes for p in layer.parameters()) // layer.local_num_experts)
        for layer in layers
    ]


def least_fraction(layers: list[tuple[int, int, int]]) -> float:
    """The `cache_fraction` that gives every pool, one for each size of experts, the slots of one token at least."""
    pools: dict[int, tuple[int, int]] = {}
    for experts, top_k, size in layers:
        others, most = pools.get(size, (0, 0))
        pools[size] = others + experts, max(most, top_k)
    return max(top_k / experts for experts, top_k in pools.values())


def compare(stock: list[Any], ours: list[Any]) -> dict[str, Any]:
    """How many tokens are equal, and how far log probabilities are apart where both saw the same tokens.

    Where an expert's output is rounded once more, a router that is nearly undecided may choose another expert: that
    makes single log probabilities differ much (`difference`), but not the typical one (`median`).
    """
    equal = total = 0
    apart: list[float] = []
    for theirs, mine in zip(stock, ours, strict=True):
        total += len(theirs["tokens"])
        apart += [abs(a - b) for a, b in zip(theirs["prompt"], mine["prompt"], strict=True)]
        for position, (token, other) in enumerate(zip(theirs["tokens"], mine["tokens"], strict=True)):
            one, two = theirs["logprobs"][position], mine["logprobs"][position]
            apart += [abs(one[key] - two[key]) for key in one.keys() & two.keys()]
            if token != other:
                break
            equal += 1
    return {
        "equal": equal,
        "tokens": total,
        "difference": float(f"{max(apart):.3g}"),
        "median": float(f"{median(apart):.3g}"),
    }


def one_line(error: BaseException) -> str:
    """The cause of it all, its message and its place in the code."""
    cause: BaseException = error
    while cause.__cause__ or (cause.__context__ and not cause.__suppress_context__):
        cause = cause.__cause__ or cause.__context__
    place = traceback.extract_tb(cause.__traceback__)[-1:] if cause.__traceback__ else []
    where = f" ({Path(place[0].filename).name}:{place[0].lineno})" if place else ""
    message = " ".join(str(cause).split("[type=")[0].split())
    return f"{type(cause).__name__}: {message}"[:300] + where
