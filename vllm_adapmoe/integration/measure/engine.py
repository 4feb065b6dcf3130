"""Runs a vLLM engine offline for measurements, with or without the expert cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.left_out import check_not_left_out
from vllm_adapmoe.integration.loading.identity import model_hash
from vllm_adapmoe.integration.measure.forced_tokens import forced_sampling, forcing_arguments
from vllm_adapmoe.integration.model_info import model_info
from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint
from vllm_adapmoe.profile.model_profile import ModelInfo, ModelProfile

KV_CACHE_BYTES = 256 << 20
EXTENSION = "vllm_adapmoe.integration.measure.worker_extension.MeasuredWorker"


@dataclass(frozen=True)
class Generation:
    """Tokens and times of one batch of equal requests."""

    tokens: list[list[int]]
    prefill_seconds: float
    """Seconds from the first request's arrival until the last one's first token."""
    decode_seconds: float
    """Seconds from the last request's first token until the last token of all."""


class Engine:
    """An `LLM` with greedy sampling on token ids.

    Args:
        model: folder of a checkpoint.
        adapmoe: configuration of the expert cache; None for stock vLLM.
        forced: whether requests can be given tokens to output.
        engine_args: further arguments of `LLM`.
    """

    def __init__(
        self, model: Path | str, adapmoe: dict[str, Any] | None, forced: bool = False, **engine_args: Any
    ) -> None:
        self.cached = adapmoe is not None
        if self.cached:
            check_not_left_out()
        method: dict[str, Any] = {}
        if adapmoe is not None:
            method = {"moe_method": "adapmoe", "adapmoe_config": adapmoe, "worker_extension_cls": EXTENSION}
        defaults = {
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "disable_log_stats": False,
            "enable_prefix_caching": False,
        }
        if forced:
            defaults |= forcing_arguments()
        self.llm = LLM(str(model), **(defaults | method | engine_args))

    def params(self, tokens: int, forced: list[int] | None = None, **arguments: Any) -> SamplingParams:
        """Returns parameters for greedy sampling of exactly `tokens` tokens.

        Args:
            tokens: number of output tokens.
            forced: tokens to output instead of the model's; None: the model's. Needs an engine made with `forced`.
            arguments: further arguments of `SamplingParams`.
        """
        given = {} if forced is None else forced_sampling(self.llm.llm_engine.vllm_config, forced)
        return SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **(given | arguments)
        )  # fmt: skip

    def generate(
        self, prompts: list[list[int]], output_tokens: int, forced: list[list[int]] | None = None
    ) -> Generation:
        """Completes all `prompts` in one batch, each by exactly `output_tokens` tokens.

        `forced` are tokens to output instead of the model's; needs an engine made with `forced`.
        """
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [self.params(output_tokens, None if forced is None else forced[n]) for n in range(len(prompts))],
            use_tqdm=False,
        )
        times = [output.metrics for output in outputs if output.metrics is not None]
        first = max(time.first_token_ts for time in times)
        return Generation(
            tokens=[list(output.outputs[0].token_ids) for output in outputs],
            prefill_seconds=max(time.first_token_ts - time.queued_ts for time in times),
            decode_seconds=max(time.last_token_ts for time in times) - first,
        )

    def best_tokens(self, ids: list[int], prompt_tokens: int) -> Iterator[int]:
        """Decodes the ids after the prompt, one per engine step; yields the most probable token at each.

        Needs an engine made with `forced`. The first is yielded after the prompt, before any id has been decoded.
        """
        engine, forced = self.llm.llm_engine, ids[prompt_tokens:]
        params = self.params(len(forced), forced, logprobs=1, flat_logprobs=True)
        engine.add_request("best-tokens", TokensPrompt(prompt_token_ids=ids[:prompt_tokens]), params)
        known = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                flat: Any = output.outputs[0].logprobs  # type: ignore[index]
                for start in flat.start_indices[known:]:  # the forced token first, then the most probable one
                    yield flat.token_ids[start + 1]
                known = len(flat.start_indices)

    def cache_stats(self) -> dict[str, float]:
        """Returns the first worker's expert cache counters since the start; empty for stock vLLM."""
        return self.call("expert_cache_stats") if self.cached else {}

    def call(self, method: str, *args: Any) -> Any:
        """Calls a method of every worker, and returns the first one's result."""
        return self.llm.collective_rpc(method, args=args)[0]

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def count_experts(model: Path) -> int:
    """Returns the number of routed experts of a model, over all layers."""
    return measure_checkpoint(model, None, None)[1].experts


def load_profile(path: Path, model: Path) -> ModelProfile:
    """Loads the profile of a model.

    Raises:
        AdapMoEError: no profile, or one of another model.
    """
    profile = ModelProfile.load(path)
    profile.check(describe_model(model), str(path))
    return profile


def check_settings(model: Path, adapmoe: dict[str, Any]) -> None:
    """Checks that an engine of the model would start with these settings, as far as is known without building it.

    Raises:
        AdapMoEError: it would not.
    """
    method: dict[str, Any] = {"moe_method": "adapmoe", "adapmoe_config": adapmoe}
    EngineArgs(model=str(model), skip_tokenizer_init=True, **method).create_engine_config()


def describe_model(model: Path) -> ModelInfo:
    """Returns the `ModelInfo` of the checkpoint in a folder, as in a profile, with the hash of all its bytes.

    Raises:
        AdapMoEError: the model is a pooling model.
    """
    arguments = EngineArgs(model=str(model), skip_tokenizer_init=True)
    config = arguments.create_model_config()
    if config.runner_type != "generate":
        raise AdapMoEError(
            f"model={str(model)!r} is a pooling model, which samples no tokens, so that no loss can be measured; "
            "serve it without a profile"
        )
    return model_info(config).model_copy(update={"hash": model_hash(config, arguments.create_load_config())})
