"""Measures decisions and bookkeeping for the shapes of large models: random routing, no weights, no engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.big_shapes_memory import bookkeeping, measure_profile, weights_of
from vllm_adapmoe.cache.slot_maps import SlotMaps
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.integration.measure.part_timer import PartTimer
from vllm_adapmoe.integration.measure.thread_clock import open_clock
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.chances import chance_of_any
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.policy.prediction import PredictedExperts, predict_experts
from vllm_adapmoe.prefetch.request_experts import RequestExperts

DECISIONS = ("begin", "prefetch", "release", "transfers")
"""Parts that are decisions of the `CacheController`."""
PARTS = (*DECISIONS, "rank", "heads", "requests")
TARGET_MS, TARGET_MB = 2.0, 100.0
"""Targets for the decisions of a step, and for all bookkeeping on the host."""
LOOKAHEAD, MAX_EXPERTS = 3, 1
"""The defaults of `prefetch`."""
CORRECT = 0.8
"""Chance that a predicted expert is among those used; with random predictions nothing would be prefetched."""


@dataclass(frozen=True)
class Shape:
    """Routed experts of a model."""

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int


SHAPES = (Shape("Kimi-K2", 60, 384, 8, 7168), Shape("Qwen3-Next", 48, 512, 10, 2048))


class Steps:
    """Decode steps of a cache: the calls of a worker, in its order, with loads that complete at once.

    Predictions are right with the chance `CORRECT`. What it takes to make them up counts for no part.

    Args:
        shape: the model's experts.
        batch: requests of every step.
        resident: share of the experts that have a slot.
        timer: times the calls.
    """

    def __init__(self, shape: Shape, batch: int, resident: float, timer: PartTimer) -> None:
        self.shape, self.batch = shape, batch
        layers, experts = shape.layers, shape.experts
        cache_shape = CacheShape([experts] * layers, shape.top_k, [0] * layers, [1] * layers)
        slots = int(layers * experts * resident)
        setup = CacheSetup([slots], "next_token", lookahead=LOOKAHEAD, max_experts=MAX_EXPERTS)
        self.controller = controller = CacheController(cache_shape, setup)
        self.maps = SlotMaps(controller.pools, cache_shape.pool_of, cache_shape.num_experts)
        self.requests = RequestExperts(LOOKAHEAD, experts)
        self.names = [str(number) for number in range(batch)]
        self.random = np.random.default_rng(0)
        self._fill(slots)
        self.begin = timer.timed("begin", controller.begin)
        self.release = timer.timed("release", controller.release)
        self.prefetch = timer.timed("prefetch", controller.prefetch)
        self.prefetch_first_layers = timer.timed("prefetch", controller.prefetch_first_layers)
        self.start_speculation = timer.timed("transfers", controller.start_speculation)
        self.transfer_ended = timer.timed("transfers", controller.transfer_ended)
        self.rank = timer.timed("rank", predict_experts)
        self.chances = timer.timed("heads", chance_of_any)
        self.begin_requests = timer.timed("requests", self._begin_requests)
        self.record_prediction = timer.timed("requests", self.requests.record_prediction)
        self.end_requests = timer.timed("requests", self.requests.end)
        self.predict = timer.timed("made up", self._predict)

    def _fill(self, slots: int) -> None:
        """Makes as many experts of every layer resident as its share of the slots."""
        for layer in range(self.shape.layers):
            experts = self.random.permutation(self.shape.experts)[: slots // self.shape.layers].tolist()
            request = self.controller.begin(layer, experts)
            for load in request.loads:
                self.controller.transfer_ended(load.key, 1, True)
            self.controller.release(layer, experts)

    def run(self) -> None:
        """Runs one step."""
        shape, random = self.shape, self.random
        routing = random.random((shape.layers, self.batch, shape.experts), dtype=np.float32)
        ids = np.argpartition(routing, -shape.top_k, axis=2)[:, :, -shape.top_k :]
        correct = random.random(ids.shape) < CORRECT
        self._speculate(self.prefetch_first_layers(0, list(self.begin_requests())))
        kept = np.ones(ids.shape[1:], dtype=bool)
        for layer in range(shape.layers):
            outputs = random.random((self.batch, shape.experts), dtype=np.float32) * (2 * shape.top_k / shape.experts)
            expected = self.chances(outputs)
            if layer < LOOKAHEAD:
                self.record_prediction(layer, outputs)
            experts = np.unique(ids[layer])
            request = self.begin(layer, experts, (), expected)
            queued = self.prefetch(layer, (ids[layer], kept), partial(self.predict, layer, ids, correct))
            for load in request.loads:
                self.transfer_ended(load.key, 1, True)
            self._speculate(queued)
            self.release(layer, experts)
        self.end_requests()

    def _predict(self, layer: int, ids: np.ndarray, correct: np.ndarray, distance: int) -> PredictedExperts:
        logits = self.random.random((self.batch, self.shape.experts), dtype=np.float32)
        tokens, ranks = correct[layer + distance].nonzero()
        logits[tokens, ids[layer + distance][tokens, ranks]] += 1
        return self.rank(logits, self.shape.top_k)

    def _speculate(self, queued: Sequence[tuple[int, int]]) -> None:
        for key in queued:
            if self.start_speculation(key) is not None:
                self.transfer_ended(key, 1, True)

    def _begin_requests(self) -> Sequence[np.ndarray]:
        self.requests.begin(self.names)
        chances = self.requests.batch_chances(self.names)
        return () if chances is None else list(chances)


def run_big_shapes(shapes: Sequence[Shape], batches: Sequence[int], steps: int, resident: float) -> dict[str, Any]:
    """Measures each shape with each batch, on this thread's CPU clock."""
    return {
        "benchmark": "big_shapes",
        "resident": resident,
        "correct_predictions": CORRECT,
        "targets": {"decisions_ms": TARGET_MS, "bookkeeping_mb": TARGET_MB},
        "shapes": [
            {
                **vars(shape),
                "batches": [measure_batch(shape, batch, steps, resident) for batch in batches],
                "profile": measure_profile(shape.layers, shape.experts, shape.top_k, shape.hidden, LOOKAHEAD),
                "weights": weights_of(shape.layers, shape.experts, shape.hidden, LOOKAHEAD),
            }
            for shape in shapes
        ],
    }


def measure_batch(shape: Shape, batch: int, steps: int, resident: float) -> dict[str, Any]:
    """Measures steps of one batch: CPU ms by part, events per step, and memory by module."""
    timer = PartTimer()
    run = Steps(shape, batch, resident, timer)
    run.run()  # warms up
    before = vars(run.controller.stats).copy()
    costs = []
    timer.start(open_clock("cpu"), PARTS)
    for _ in range(steps):
        run.run()
        costs.append(timer.take())
    counted = {name: value - before[name] for name, value in vars(run.controller.stats).items()}
    parts = {part: [cost.get(part, 0.0) / 1e6 for cost in costs] for part in PARTS}
    sums = {"decisions": [sum(each) for each in zip(*(parts[part] for part in DECISIONS), strict=True)]}
    sums["all"] = [sum(each) for each in zip(*parts.values(), strict=True)]
    return {
        "batch": batch,
        "steps": steps,
        "per_step": {name: counted[name] / steps for name in ("hits", "misses", "prefetches", "prefetch_hits")},
        "ms": {
            name: {"median": float(np.median(values)), "p90": float(np.quantile(values, 0.9))}
            for name, values in (sums | parts).items()
        },
        "memory_mb": bookkeeping(lambda: Steps(shape, batch, resident, PartTimer())),
    }


def print_big_shapes(result: dict[str, Any], console: Console) -> None:
    """Prints two tables for each shape: CPU time of a step's parts, and memory on the host by module."""
    targets = result["targets"]
    for shape in result["shapes"]:
        batches = shape["batches"]
        name = f"{shape['name']}: {shape['layers']} layers, {shape['experts']} experts, top-{shape['top_k']}"
        times = Table(title=f"CPU ms a step, median (p90), {result['resident']:.0%} resident, {name}")
        times.add_column("")
        memory = Table(title=f"Bookkeeping on the host, MB, {name}")
        memory.add_column("")
        for measured in batches:
            for table in (times, memory):
                table.add_column(f"batch {measured['batch']}", justify="right")
        for part in (*PARTS, "all"):
            cells = [f"{each['ms'][part]['median']:.2f} ({each['ms'][part]['p90']:.2f})" for each in batches]
            times.add_row(part, *cells, end_section=part == PARTS[-1])
        decisions = [each["ms"]["decisions"]["median"] for each in batches]
        title = f"decisions: {', '.join(DECISIONS)}; target {targets['decisions_ms']:g}"
        times.add_row(title, *(_against(value, targets["decisions_ms"]) for value in decisions), end_section=True)
        for count in batches[0]["per_step"]:
            times.add_row(count.replace("_", " "), *(f"{each['per_step'][count]:.0f}" for each in batches))
        for module in sorted({module for each in batches for module in each["memory_mb"]}):
            memory.add_row(module, *(f"{each['memory_mb'].get(module, 0):.2f}" for each in batches))
        profile = shape["profile"]
        memory.add_row("profile", *[f"{profile['memory_mb']:.2f}"] * len(batches), end_section=True)
        totals = [sum(each["memory_mb"].values()) + profile["memory_mb"] for each in batches]
        title = f"all; target {targets['bookkeeping_mb']:g}"
        memory.add_row(title, *(_against(value, targets["bookkeeping_mb"]) for value in totals))
        console.print(times)
        console.print(memory)
        console.print(
            f"profile: {profile['file_mb']:.1f} MB of JSON, loaded in {profile['load_seconds']:.2f} s; threshold in "
            f"{profile['threshold_seconds']:.2f} s, curves in {profile['curves_seconds']:.2f} s"
        )
        for weights in shape["weights"]:
            console.print(f"{weights['part']}: {weights['mb']:.0f} MB ({weights['where']})")


def _against(value: float, target: float) -> str:
    return f"{value:.2f}" if value < target else f"[red]{value:.2f}[/red]"
