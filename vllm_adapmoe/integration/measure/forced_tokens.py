"""Forces the output tokens of requests, to measure an engine on real text.

Model runner V2 has vLLM's trace replay for this and supports no V1 logits processors; V1 has no replay. In both, log
probabilities are the model's own, taken before a token is forced.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "adapmoe_forced_tokens"
"""Key of `SamplingParams.extra_args` that holds the tokens for V1."""


def forcing_arguments() -> dict[str, Any]:
    """Returns the arguments of `LLM` that allow forced tokens, for the runner that vLLM chooses on this machine."""
    return {"enable_trace_replay": True} if VllmConfig().use_v2_model_runner else {"logits_processors": [ForcedTokens]}


def forced_sampling(vllm_config: VllmConfig, tokens: list[int]) -> dict[str, Any]:
    """Returns the arguments of `SamplingParams` that force the output `tokens`."""
    if vllm_config.model_config.enable_trace_replay:
        return {"trace_decode_token_ids": tokens}
    return {"extra_args": {FORCED: tokens}}


class ForcedTokens(AdapterLogitsProcessor):
    """Logits processor that forces given tokens under model runner V1."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forced = (params.extra_args or {}).get(FORCED)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = forced[min(len(output_ids), len(forced) - 1)]
            value = logits[token].clone()
            logits.fill_(float("-inf"))
            logits[token] = value
            return logits

        return force
