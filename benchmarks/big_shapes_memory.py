"""Memory of a cache's bookkeeping by module, and of what is weights: gate stacks and next-token heads."""

import gc
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import vllm_adapmoe
from vllm_adapmoe.cache.slot_maps import SlotMaps
from vllm_adapmoe.prefetch.heads import NextTokenHeads
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import (
    EDGES,
    DropHistogram,
    LayerProfile,
    ModelInfo,
    ModelProfile,
    Prediction,
)

PACKAGE = Path(vllm_adapmoe.__file__).parent
ROOMS = ("policy", "cache", "prefetch", "profile")
MB = 1e6
STEPS = 3
"""Steps before memory is measured; the bookkeeping grows with the experts that are resident, not with steps."""
DEPTH = 5
"""Frames that are kept of each allocation: the innermost of the package says whose memory it is."""


class Running(Protocol):
    """Steps of a cache."""

    maps: SlotMaps

    def run(self) -> None:
        """Runs one step."""


def bookkeeping(build: Callable[[], Running]) -> dict[str, float]:
    """Returns the MB that each module of the package keeps on the host, after some steps."""
    gc.collect()
    tracemalloc.start(DEPTH)
    try:
        steps = build()
        for _ in range(STEPS):
            steps.run()
        gc.collect()
        kept = _by_module()
    finally:
        tracemalloc.stop()
    module = "cache/slot_maps.py"
    kept[module] = kept.get(module, 0.0) + sum(slots.nbytes for slots in steps.maps) / MB  # torch's, so not traced
    return kept


def _by_module() -> dict[str, float]:
    kept: dict[str, float] = {}
    for allocated in tracemalloc.take_snapshot().statistics("traceback"):
        modules = (_module(frame.filename) for frame in reversed(allocated.traceback))  # the innermost is the last
        module = next((name for name in modules if name is not None), None)
        if module is not None:
            kept[module] = kept.get(module, 0.0) + allocated.size / MB
    return kept


@cache
def _module(filename: str) -> str | None:
    """Returns a file's path within the package, if it is in one of `ROOMS`."""
    path = Path(filename)
    if path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in ROOMS:
        return str(path.relative_to(PACKAGE))
    return None


def measure_profile(layers: int, experts: int, top_k: int, hidden: int, lookahead: int) -> dict[str, float]:
    """Returns a profile's size as a file and in memory, MB, and CPU seconds to load it and to derive from it."""
    made = _profile(layers, experts, top_k, hidden, lookahead)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        made.save(path)
        start = time.thread_time()
        ModelProfile.load(path)
        loaded = time.thread_time()
        made.threshold_for_experts((1 + top_k) / 2)
        thresholds = time.thread_time()
        curves_of_profile(made, 0.0, 1)
        curves = time.thread_time()
        tracemalloc.start()
        try:
            profile = ModelProfile.load(path)
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        file = path.stat().st_size
    assert len(profile.layers) == layers
    return {
        "file_mb": file / MB,
        "memory_mb": kept / MB,
        "load_seconds": loaded - start,
        "threshold_seconds": thresholds - loaded,
        "curves_seconds": curves - thresholds,
    }


def _profile(layers: int, experts: int, top_k: int, hidden: int, lookahead: int) -> ModelProfile:
    random = np.random.default_rng(0)
    bins = len(EDGES) + 1

    def layer() -> LayerProfile:
        popularity = random.random(experts)
        return LayerProfile(
            sensitivity=float(random.random()),
            dropped=[DropHistogram.of(random.random(bins), random.random(bins), bins) for _ in range(top_k - 1)],
            popularity=(popularity / popularity.sum()).round(7).tolist(),
            predictions=[
                Prediction(lookahead=ahead + 1, recall=0.5, precision=random.random(top_k).round(7).tolist())
                for ahead in range(lookahead)
            ],
        )

    model = ModelInfo(
        name="random", architecture="random", hidden_size=hidden, num_layers=layers, num_experts=experts, top_k=top_k
    )
    return ModelProfile(method="forward", source="random", model=model, layers=[layer() for _ in range(layers)])


def weights_of(layers: int, experts: int, hidden: int, lookahead: int) -> list[dict[str, Any]]:
    """Returns the MB of gate stacks and next-token heads, and where they are."""
    from vllm_adapmoe.integration.worker.gate_stack import GateStack  # imports vLLM, which takes seconds
    from vllm_adapmoe.integration.worker.gate_trial import LinearGate

    device = torch.device("meta")
    gate = LinearGate(torch.empty(hidden, experts, device=device), torch.empty(experts, device=device))
    head = np.zeros((hidden + 1, experts), dtype=np.float32)
    heads = NextTokenHeads([head] * layers, head)

    def stacks(heads_of: list[np.ndarray | None]) -> float:
        made = [
            GateStack([gate] * min(lookahead, layers - 1 - index), of_layer, hidden, device)
            for index, of_layer in enumerate(heads_of)
        ]
        return sum(tensor.nbytes for stack in made for tensor in (stack.weight, stack.bias) if tensor is not None) / MB

    alone = stacks([None] * layers)
    return [
        {"part": "gate stacks", "where": "the model's device", "mb": alone},
        {
            "part": "next-token heads in the stacks",
            "where": "the model's device",
            "mb": stacks(list(heads.layers)) - alone,
        },
        {
            "part": "next-token heads as loaded",
            "where": "host",
            "mb": sum(array.nbytes for array in (*heads.layers, heads.first)) / MB,
        },
    ]
