"""`python -m benchmarks big_shapes` on a small shape."""

import time
from io import StringIO

import pytest
from rich.console import Console

from benchmarks.big_shapes import DECISIONS, LOOKAHEAD, PARTS, Shape, Steps, measure_batch, print_big_shapes
from benchmarks.big_shapes_memory import bookkeeping, measure_profile
from vllm_adapmoe.integration.measure.part_timer import PartTimer
from vllm_adapmoe.policy.controller import CacheController

SMALL = Shape("small", layers=6, experts=32, top_k=4, hidden=64)


def test_steps_request_every_routed_expert_and_prefetch():
    steps = Steps(SMALL, 8, 0.5, PartTimer())
    for _ in range(4):
        before = vars(steps.controller.stats).copy()
        steps.run()
        stats = vars(steps.controller.stats)
        events = stats["hits"] + stats["misses"] - before["hits"] - before["misses"]
        assert SMALL.layers * SMALL.top_k < events <= SMALL.layers * SMALL.experts
        assert stats["prefetches"] > before["prefetches"]
    assert stats["prefetch_hits"] > 0 and stats["late"] == 0
    slots = [slot for layer in steps.maps for slot in layer.tolist() if slot >= 0]
    assert len(slots) == len(set(slots)) == sum(steps.controller.layer_residents())
    assert len(steps.requests.chances) == 8


def test_a_slow_decision_is_seen_in_its_part(monkeypatch):
    release = CacheController.release

    def slow(self, layer, experts):
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass
        release(self, layer, experts)

    monkeypatch.setattr(CacheController, "release", slow)
    ms = measure_batch(SMALL, 2, 3, 0.5)["ms"]
    assert set(ms) == {*PARTS, "decisions", "all"}
    assert 2 * SMALL.layers <= ms["release"]["median"] < ms["decisions"]["median"] < ms["all"]["median"]
    assert all(0 < ms[part]["median"] < 2 * SMALL.layers for part in PARTS if part != "release")


def test_memory_is_found_in_its_module():
    shape = Shape("wide", layers=20, experts=200, top_k=2, hidden=64)
    memory = bookkeeping(lambda: Steps(shape, 2, 0.5, PartTimer()))
    cell = shape.layers * shape.experts / 1e6
    assert memory["cache/slot_maps.py"] == pytest.approx(4 * cell, rel=0.5), "int32"
    assert memory["policy/eviction.py"] == pytest.approx(3 * 8 * cell, rel=0.2), "three arrays of float64"
    first_layers = cell * LOOKAHEAD / shape.layers
    assert memory["prefetch/request_experts.py"] == pytest.approx(2 * 4 * first_layers, rel=0.5), "float32 per request"


def test_a_profile_of_the_shape():
    profile = measure_profile(SMALL.layers, SMALL.experts, SMALL.top_k, SMALL.hidden, 3)
    assert all(value > 0 for value in profile.values())


def test_the_table_shows_what_misses_its_target():
    measured = {
        "batch": 16,
        "steps": 5,
        "per_step": {"hits": 10.0, "misses": 20.0},
        "ms": {name: {"median": 1.25, "p90": 1.5} for name in (*PARTS, "all", "decisions")},
        "memory_mb": {"policy/residency.py": 120.0},
    }
    measured["ms"]["decisions"]["median"] = 5.0
    profile = dict.fromkeys(("file_mb", "memory_mb", "load_seconds", "threshold_seconds", "curves_seconds"), 0.5)
    weights = [{"part": "gate stacks", "where": "the model's device", "mb": 1982.0}]
    result = {
        "resident": 0.5,
        "targets": {"decisions_ms": 2.0, "bookkeeping_mb": 100.0},
        "shapes": [{**vars(SMALL), "batches": [measured], "profile": profile, "weights": weights}],
    }
    output = StringIO()
    print_big_shapes(
        result, Console(file=output, width=120, force_terminal=True, color_system="standard", highlight=False)
    )
    text = output.getvalue()
    for part in (*PARTS, *DECISIONS, "1.25 (1.50)", "policy/residency.py", "1982 MB"):
        assert part in text, part
    assert text.count("\x1b[31m") == 2, "5 ms and 120.5 MB"
