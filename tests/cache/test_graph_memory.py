"""Memory of CUDA graphs and of the cache's own tables: by hand, against the real objects, and for known models."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.residency import DeviceResidency
from vllm_adapmoe.device.step_trace import StepTrace
from vllm_adapmoe.integration.worker.gate_stack import GateStack
from vllm_adapmoe.integration.worker.gate_trial import LinearGate
from vllm_adapmoe.planning.graph_memory import (
    BLOCK_BYTES,
    PIECE_BYTES,
    WHOLE_LAYER_BYTES,
    WORKSPACE_BYTES,
    CapturedGraphs,
    bookkeeping_bytes,
    graph_bytes,
)
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape, activation_bytes, choose_slots, token_bytes
from vllm_adapmoe.policy.eviction import NextUse
from vllm_adapmoe.policy.residency import Residency
from vllm_adapmoe.units import GiB

SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
"""vLLM's own for `max_num_seqs=256`: 51, as its logs have it."""
MODEL = {"hidden": 2048, "inner": 768, "top_k": 8, "dtype_bytes": 2}
"""Qwen3-30B-A3B."""
ROW, PAIR = 4096, token_bytes(**MODEL)


def test_by_hand():
    assert len(SIZES) == 51
    assert graph_bytes(CapturedGraphs(), row_bytes=ROW, pair_bytes=PAIR) == 0
    own = 51 * 97 * PIECE_BYTES
    large = sum(size > 256 for size in SIZES)  # 1 MiB of rows of 4 KiB
    pool = large * BLOCK_BYTES + 512 * PAIR + WORKSPACE_BYTES
    assert graph_bytes(CapturedGraphs(SIZES, 97), row_bytes=ROW, pair_bytes=PAIR) == own + pool
    whole = [size for size in SIZES if size <= 64]
    assert graph_bytes(CapturedGraphs([], 0, whole, 48), row_bytes=ROW, pair_bytes=PAIR) == (
        len(whole) * 48 * WHOLE_LAYER_BYTES + 64 * PAIR + WORKSPACE_BYTES
    )


def test_what_was_reported_of_real_captures_stays_below():
    """The figures that the constants were taken from, and one that they were not."""
    llama_1b = CapturedGraphs([], 0, [1, 2, 4, *range(8, 257, 8)], 16)
    assert graph_bytes(llama_1b, row_bytes=4096, pair_bytes=token_bytes(2048, 8192, 1, 2)) > 0.21 * GiB
    # Qwen3.5 GGUF, "PIECEWISE=51 (largest=512), FULL=35 (largest=256)": 0.73 GiB (vllm-project/vllm#39559).
    qwen = CapturedGraphs(SIZES, 33, [size for size in SIZES if size <= 256], 32)
    assert graph_bytes(qwen, row_bytes=4096, pair_bytes=PAIR) > 0.73 * GiB


@given(st.lists(st.integers(1, 1024), max_size=60), st.integers(0, 300), st.integers(1, 100))
def test_more_graphs_take_more(sizes, pieces, layers):
    few = graph_bytes(CapturedGraphs(sizes, pieces, [], layers), row_bytes=ROW, pair_bytes=PAIR)
    more = graph_bytes(CapturedGraphs(sizes, pieces + 1, sizes, layers), row_bytes=ROW, pair_bytes=PAIR)
    assert 0 <= few <= more and (more > few or not sizes)


def test_the_cache_itself_takes_what_its_tensors_take():
    layers, experts, top_k, hidden, tokens, ahead = 5, 8, 2, 16, 64, 3
    cpu = torch.device("cpu")
    gates = [LinearGate(torch.zeros(hidden, experts), torch.zeros(experts)) for _ in range(layers)]
    head = np.zeros((hidden + 1, experts), dtype=np.float32)
    taken = head.nbytes  # the first layer's, for the end of the step before
    columns = 0
    for index in range(layers):
        later = list(gates[index + 1 : index + 1 + ahead])
        stack = GateStack(later, head, hidden, cpu)
        assert stack.weight is not None and stack.bias is not None
        taken += stack.weight.nbytes + stack.bias.nbytes
        columns = max(columns, stack.columns)
    routing = DeferredRouting(layers, tokens, top_k, cpu)
    taken += routing.ids.nbytes + routing.costs.nbytes
    state = DeviceResidency(
        Residency(4, 0, NextUse(layers, experts)), torch.zeros(layers, experts, dtype=torch.int64), cpu
    )
    tables = (state.records, state.slot_of[:, :-1], state.quick, state.slow, state.wait, state.prefetched)
    taken += sum(table.numel() * table.element_size() for table in tables)
    sizes = {"layers": layers, "experts": experts, "top_k": top_k, "hidden": hidden}
    assert bookkeeping_bytes(**sizes, tokens=tokens, gates_ahead=ahead, heads=True, first_head=True) == taken
    trace = StepTrace(layers, tokens, top_k, columns, cpu)
    taken += trace.ids.nbytes + trace.weights.nbytes + trace.products.nbytes
    kept = bookkeeping_bytes(**sizes, tokens=tokens, gates_ahead=ahead, heads=True, first_head=True, traced=True)
    assert kept == taken
    assert bookkeeping_bytes(**sizes, tokens=0, gates_ahead=0, heads=False, first_head=False) == 0


MIXTRAL = {"hidden": 4096, "inner": 14336, "top_k": 2, "dtype_bytes": 2}


def card(total: int, other: int, kv_cache: int, size: dict[str, int], vocabulary: int, **more: int) -> DeviceMemory:
    """A GPU with vLLM's defaults (0.32): 0.92 of it, 2048 tokens a step, 256 requests; half a GiB in use."""
    activations = activation_bytes(tokens=2048, logit_rows=256, vocabulary=vocabulary, **size)
    return DeviceMemory(int(total * 0.92), GiB // 2, other, activations, kv_cache, **more)


def test_mixtral_8x7b_on_24_gib():
    """bf16: 256 experts of 336 MiB, 3.01 GiB of other weights; 32768 tokens of KV cache are 4 GiB."""
    shape = ExpertShape(256, 3 * 4096 * 14336 * 2, 2)
    pieces = CapturedGraphs(SIZES, 32 + 32 + 1)
    graphs = graph_bytes(pieces, row_bytes=8192, pair_bytes=token_bytes(**MIXTRAL))
    kept = bookkeeping_bytes(
        layers=32, experts=8, top_k=2, hidden=4096, tokens=64, gates_ahead=3, heads=False, first_head=False
    )
    offloaded = card(24 * GiB, 3_233_292_288, 4 * GiB, MIXTRAL, 32000, graphs=graphs, bookkeeping=kept)
    eager = card(24 * GiB, 3_233_292_288, 4 * GiB, MIXTRAL, 32000, bookkeeping=kept)
    assert choose_slots(AdapMoEConfig(), [shape], offloaded, offloaded)[0] == [35]
    assert choose_slots(AdapMoEConfig(), [shape], eager, eager)[0] == [40]


def test_qwen3_30b_a3b_on_24_gib():
    """bf16: 6144 experts of 9 MiB, 2.87 GiB of other weights; 40960 tokens of KV cache are 3.75 GiB."""
    shape = ExpertShape(6144, 3 * 2048 * 768 * 2, 8)
    graphs = graph_bytes(CapturedGraphs(SIZES, 48 + 48 + 1), row_bytes=ROW, pair_bytes=PAIR)
    kept = bookkeeping_bytes(
        layers=48, experts=128, top_k=8, hidden=2048, tokens=64, gates_ahead=3, heads=False, first_head=False
    )
    offloaded = card(24 * GiB, 3_080_000_000, 4_026_531_840, MODEL, 151936, graphs=graphs, bookkeeping=kept)
    (slots,), memory = choose_slots(AdapMoEConfig(), [shape], offloaded, offloaded)
    assert memory is offloaded
    assert slots == 1308
    assert f"{graphs / GiB:.2f}" == "1.65"
    assert f"{kept / GiB:.2f}" == "0.14"
    nothing = replace(offloaded, graphs=0, bookkeeping=0)
    assert choose_slots(AdapMoEConfig(), [shape], nothing, nothing)[0] == [1511]


def test_a_model_that_fits_is_resident_though_it_would_not_fit_with_what_offloading_takes():
    shape = ExpertShape(256, GiB // 4, 2)
    resident, offloaded = DeviceMemory(65 * GiB, graphs=GiB), DeviceMemory(65 * GiB, graphs=2 * GiB)
    assert choose_slots(AdapMoEConfig(), [shape], resident, offloaded) == ([256], resident)
    small, less = DeviceMemory(64 * GiB, graphs=GiB), DeviceMemory(64 * GiB, graphs=2 * GiB)
    assert choose_slots(AdapMoEConfig(), [shape], small, less) == ([248], less)
    cheap = DeviceMemory(64 * GiB)  # nothing is captured of the offloaded model; resident it would not fit
    slots, memory = choose_slots(AdapMoEConfig(), [shape], small, cheap)
    assert slots == [252] and memory.graphs == GiB
