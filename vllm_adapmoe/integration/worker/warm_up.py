"""Compiles the loops of a step's decisions before the first request, which would wait for them."""

import numpy as np
import torch

from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.integration.layers.cached_experts import distinct, kept_pairs
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.chances import chance_of_any
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.prediction import PredictedExperts, predict_experts

EXPERTS, TOP_K, LAYERS = 8, 2, 4


def warm_up_decisions(eviction: str) -> None:
    """Takes the decisions of some steps of a small cache, so that every compiled loop runs with the types of a step.

    Five seconds on a new machine; a third of a second once numba has cached the code.

    Args:
        eviction: eviction policy of the worker's cache.
    """
    shape = CacheShape([EXPERTS] * LAYERS, TOP_K, [0] * LAYERS, [1] * LAYERS)
    setup = CacheSetup([LAYERS * EXPERTS // 2], eviction, lookahead=2, max_experts=1)
    controller = CacheController(shape, setup)
    for rows in (1, 2):  # columns of one row are contiguous, those of more rows are not
        outputs = np.random.default_rng(rows).standard_normal((rows, 2 * EXPERTS), dtype=np.float32)
        logits = outputs[:, EXPERTS:]
        chance_of_any(np.stack([logits[:1]] * 2))
        for layer in range(LAYERS):
            for shift in range(0, EXPERTS, TOP_K):
                ids = torch.arange(rows * TOP_K, dtype=torch.int32).view(rows, TOP_K).add(shift) % EXPERTS
                _run_event(controller, layer, ids, logits)


def _run_event(controller: CacheController, layer: int, ids: torch.Tensor, logits: np.ndarray) -> None:
    def predict(distance: int) -> PredictedExperts:
        for by_batch in (False, True):
            predict_experts(logits, TOP_K, 1.0, 1.0, by_batch)
        predict_experts(logits, TOP_K, correction=np.zeros(EXPERTS, dtype=np.float32))
        return predict_experts(logits, TOP_K)

    expected = chance_of_any(logits)
    experts = distinct(ids, EXPERTS)
    pairs = kept_pairs(torch.ones(ids.shape, dtype=torch.bool), ids, torch.ones(ids.shape, dtype=torch.float32))
    distinct(torch.from_numpy(pairs.ids), EXPERTS)  # of gated steps
    queued = controller.prefetch_first_layers(0, [expected])
    request = controller.begin(layer, experts, (), expected)
    routing = ids.numpy(), np.ones(ids.shape, dtype=bool)
    queued += controller.prefetch(layer, routing, predict)
    for load in request.loads:
        controller.transfer_ended(load.key, 1, True)
    for key in queued:
        if controller.start_speculation(key) is not None:
            controller.transfer_ended(key, 1, True)
    controller.release(layer, experts)
