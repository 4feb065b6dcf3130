"""Slots give way to the KV cache of one request, when vLLM has measured less memory for it than was estimated."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY_MIXTRAL
from test_memory import answer, offline
from vllm.config import CompilationConfig, CUDAGraphMode

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.loading import kv_room
from vllm_adapmoe.integration.loading.graph_memory import captured_graphs
from vllm_adapmoe.integration.measure.engine import Engine
from vllm_adapmoe.integration.settings import EngineSettings
from vllm_adapmoe.planning.graph_memory import CapturedGraphs
from vllm_adapmoe.units import GiB


class Loading:
    """Slots of 1 GiB."""

    pools = SimpleNamespace(expert_bytes=20 * GiB, memory=SimpleNamespace(remedy="lower max_model_len=8"))

    def __init__(self) -> None:
        self.given: list[int] = []

    def shrink_slots(self, cache: Any, nbytes: int) -> int:
        self.given.append(nbytes)
        return -(-nbytes // GiB) * GiB


@pytest.fixture
def room(monkeypatch):
    """`room_for_kv_cache` where one request takes 4 GiB."""
    monkeypatch.setattr(kv_room, "min_kv_cache", lambda config: (4 * GiB, "one request of 8 tokens"))
    monkeypatch.setattr(kv_room, "get_tp_group", lambda: SimpleNamespace(world_size=1))

    def ask(available: int, cache: Any = "slots", given: int | None = None, length: int = 8, **budget: Any):
        config = SimpleNamespace(
            model_config=SimpleNamespace(original_max_model_len=length),
            cache_config=SimpleNamespace(kv_cache_memory_bytes=given),
        )
        if cache == "slots":
            cache = SimpleNamespace(num_slots=10, pools=[SimpleNamespace(nbytes=10 * GiB)])
        loading = Loading()
        return kv_room.room_for_kv_cache(AdapMoEConfig(**budget), config, loading, cache, available), loading.given

    return ask


def test_where_it_fits_nothing_gives_way(room):
    assert room(4 * GiB) == (4 * GiB, [])
    assert room(9 * GiB, cache=None) == (9 * GiB, [])
    assert room(GiB, given=GiB) == (GiB, [])  # kv_cache_memory_bytes
    assert room(GiB, length=-1) == (GiB, [])  # as many tokens as fit


def test_slots_give_way_to_what_was_measured(room):
    assert room(4 * GiB - 1) == (5 * GiB - 1, [1])
    assert room(-2 * GiB) == (4 * GiB, [6 * GiB])


@pytest.mark.parametrize(
    ("cache", "budget", "most"), [("slots", {"cache_gb": 10.0}, 7.5), (None, {"cache_gb": "auto"}, 17.5)]
)
def test_a_budget_that_was_asked_for_is_refused_with_one_that_fits(room, cache, budget, most):
    with pytest.raises(AdapMoEError) as error:
        room(3 * GiB // 2, cache=cache, **budget)
    assert str(error.value) == (
        "vLLM has measured 1.500 GiB for a KV cache that takes 4.000 for one request of 8 tokens; "
        f"set at most cache_gb={most:.3f}, or lower max_model_len=8"
    )


SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
PIECES, WHOLE = SIZES, [size for size in SIZES if size <= 256]
SMALL = [size for size in SIZES if size <= 64]


@pytest.mark.parametrize(
    ("mode", "resident", "decode", "expected"),
    [
        ("NONE", False, "auto", []),
        ("FULL_AND_PIECEWISE", True, "auto", [CapturedGraphs(PIECES, 49, WHOLE, 48)]),
        ("FULL_AND_PIECEWISE", False, "host", [CapturedGraphs(PIECES, 97, [], 48)]),
        (
            "FULL_AND_PIECEWISE", False, "auto",
            [CapturedGraphs(PIECES, 97, [], 48), CapturedGraphs(SMALL, 97, SMALL, 48)],
        ),
        ("FULL", True, "auto", [CapturedGraphs([], 0, SIZES, 48)]),
        ("FULL", False, "host", [CapturedGraphs(PIECES, 97, [], 48)]),
        ("FULL_DECODE_ONLY", False, "host", []),
        ("FULL_DECODE_ONLY", False, "auto", [CapturedGraphs([], 0, SMALL, 48)]),
        ("PIECEWISE", False, "host", [CapturedGraphs(PIECES, 97, [], 48)]),
    ],
)  # fmt: skip
def test_which_graphs_are_captured(mode, resident, decode, expected):
    """Qwen3-30B-A3B: 48 layers, all with experts; `max_num_seqs=256`."""
    config: Any = SimpleNamespace(
        compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode[mode], cudagraph_capture_sizes=SIZES),
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        parallel_config=None,
        model_config=SimpleNamespace(get_num_layers=lambda parallel: 48),
    )
    assert captured_graphs(EngineSettings(config=AdapMoEConfig(decode=decode)), config, 48, 48, resident) == expected


@pytest.mark.engine
def test_an_engine_that_measures_less_starts_with_fewer_slots(tmp_path: Path) -> None:
    """VLLM's measurement is made smaller, by 20 experts; what the slots then hold is still right."""
    script = Path(__file__).parent / "run_short_of_memory.py"
    config = {"cache_gb": "auto", "store": "file", "store_dir": str(tmp_path)}
    run = subprocess.run([sys.executable, script, TINY_MIXTRAL, json.dumps(config)], capture_output=True, text=True)
    result = answer(run)
    assert result["tokens"] == answer(offline(TINY_MIXTRAL, None))["tokens"]
    assert result["stats"]["slots"] == result["before"] - 20
    assert result["stats"]["misses"] > result["stats"]["slots"]
    assert "of slots, " in run.stdout + run.stderr and "slots remain" in run.stdout + run.stderr


def _stacks(worker: Any) -> list[int]:
    """Bytes of the gates of each layer that has them by now."""
    stacks = worker.predictor.stacks
    return [sum(t.nbytes for t in (one.weight, one.bias) if t is not None) for one in stacks]


def _planned(worker: Any) -> int:
    return worker._loading.pools.memory.bookkeeping


@pytest.mark.engine
def test_gates_are_there_before_the_kv_cache_takes_the_rest_and_as_large_as_planned(tmp_path: Path) -> None:
    config = {"cache_fraction": 0.5, "store": "file", "store_dir": str(tmp_path)}
    engine = Engine(TINY_MIXTRAL, config, enforce_eager=True, max_model_len=128, max_num_seqs=4)
    try:
        (built,), (planned,) = engine.llm.collective_rpc(_stacks), engine.llm.collective_rpc(_planned)
        assert len(built) == 12, "built by the first request, when the memory is given away"
        assert sum(built) == planned > 0
        engine.generate([[5, 17, 301]], 4)
        assert engine.llm.collective_rpc(_stacks) == [built]
    finally:
        engine.close()
