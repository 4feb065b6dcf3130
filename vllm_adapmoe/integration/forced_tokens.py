"""Requests that are given their answer, token by token, to measure an engine on real text."""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "adapmoe_forced_tokens"
"""Key of `SamplingParams.extra_args`: the tokens."""


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request sample given tokens; log probabilities are taken before it, so they are the model's own."""

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
