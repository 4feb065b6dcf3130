"""Slots that a budget buys."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.planning.slot_budget import (
    RUNTIME_BYTES,
    DeviceMemory,
    ExpertShape,
    activation_bytes,
    bytes_of,
    count_slots,
    split_layers,
)
from vllm_adapmoe.units import GiB

MIXTRAL = ExpertShape(num_experts=256, bytes_per_expert=GiB // 4, top_k=2)
OTHER = ExpertShape(num_experts=64, bytes_per_expert=GiB // 2, top_k=4)
PLENTY = DeviceMemory(1000 * GiB)


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ({"cache_experts": 128}, 128),
        ({"cache_experts": 256}, 256),
        ({"cache_fraction": 0.5}, 128),
        ({"cache_fraction": 1.0}, 256),
        ({"cache_gb": 8.0}, 32),
        ({"cache_gb": 8.2}, 32),
        ({"cache_gb": 900.0}, 256),
        ({"cache_gb": "auto"}, 256),
        ({}, 256),
    ],
)
def test_slots_of_one_shape(budget, slots):
    assert count_slots(AdapMoEConfig(**budget), [MIXTRAL], PLENTY) == [slots]


def test_shapes_share_a_budget_by_their_bytes():
    shapes = [MIXTRAL, OTHER]
    assert count_slots(AdapMoEConfig(cache_fraction=0.25), shapes, PLENTY) == [64, 16]
    assert count_slots(AdapMoEConfig(cache_gb=48.0), shapes, PLENTY) == [128, 32]
    assert count_slots(AdapMoEConfig(), shapes, DeviceMemory(48 * GiB)) == [128, 32]


def test_the_automatic_budget_is_what_everything_else_leaves():
    memory = DeviceMemory(24 * GiB, 1 * GiB, 3 * GiB, 2 * GiB, 2 * GiB, "one request of 32768 tokens")
    assert count_slots(AdapMoEConfig(), [MIXTRAL], memory) == [64]
    said = "24.00 usable - 1.00 in use - 3.00 other weights - 2.00 activations - 2.00 KV cache"
    assert str(memory) == f"{said} (one request of 32768 tokens)"


def test_graphs_and_tables_are_left_room_for_and_named():
    memory = DeviceMemory(24 * GiB, graphs=2 * GiB, graphs_of="51 sizes in 97 pieces", bookkeeping=GiB // 2)
    assert memory.left == 21 * GiB + GiB // 2
    assert count_slots(AdapMoEConfig(), [MIXTRAL], memory) == [86]
    said = "24.00 usable - 2.00 CUDA graphs (51 sizes in 97 pieces, estimated) - 0.50 gates and tables"
    assert str(memory) == said
    with pytest.raises(AdapMoEError, match=re.escape(said)):
        count_slots(AdapMoEConfig(cache_gb=22.0), [MIXTRAL], memory)


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ({"cache_experts": 1}, "cache_experts=1"),
        ({"cache_experts": 257}, "cache_experts=257"),
        ({"cache_fraction": 0.001}, "cache_fraction=0.001"),
        ({"cache_gb": 0.3}, "cache_gb=0.3"),
    ],
)
def test_an_impossible_budget_is_named_with_its_remedy(budget, named):
    with pytest.raises(AdapMoEError, match=named) as error:
        count_slots(AdapMoEConfig(**budget), [MIXTRAL], PLENTY)
    assert "\n" not in str(error.value) and "set at" in str(error.value)


@pytest.mark.parametrize(
    ("budget", "left", "told"),
    [
        ({"cache_gb": 40.0}, 12 * GiB, "cache_gb=40.0 takes 40.000 GiB for 160 expert slots, 30064771072 bytes"),
        ({"cache_gb": 40.0}, 12 * GiB, "(28.000 GiB) more than the 12.000 GiB left: 16.00 usable - 4.00 other weights"),
        ({"cache_gb": 40.0}, 12 * GiB, "; set at most cache_gb=12.000, or lower max_model_len=8"),
        ({"cache_fraction": 1.0}, 1, "cache_fraction=1.0 takes 64.000 GiB for 256 expert slots, 68719476735 bytes"),
        ({"cache_experts": 8}, 1, "; lower max_model_len=8"),
        ({}, GiB // 2 - 1, "cache_gb=auto needs 0.500 GiB for the expert slots of one token, 1 bytes (0.000 GiB)"),
        ({}, -GiB, "cache_gb=auto needs 0.500 GiB for the expert slots of one token, 1610612736 bytes (1.500 GiB)"),
    ],
)
def test_a_budget_that_does_not_fit_says_by_how_many_bytes(budget, left, told):
    memory = DeviceMemory(left + 4 * GiB, other_weights=4 * GiB, remedy="lower max_model_len=8")
    with pytest.raises(AdapMoEError) as error:
        count_slots(AdapMoEConfig(**budget), [MIXTRAL], memory)
    assert told in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith("lower max_model_len=8")


shapes_of_models = st.lists(
    st.integers(1, 512).flatmap(
        lambda experts: st.builds(
            ExpertShape, st.just(experts), st.integers(1, 1 << 31), st.integers(1, min(experts, 16))
        )
    ),
    min_size=1,
    max_size=3,
)
budgets = st.one_of(
    st.just({}),
    st.builds(lambda value: {"cache_gb": value}, st.floats(1e-6, 2000)),
    st.builds(lambda value: {"cache_fraction": value}, st.floats(1e-6, 1)),
    st.builds(lambda value: {"cache_experts": value}, st.integers(1, 1536)),
)
memories = st.builds(DeviceMemory, *[st.integers(0, 200 * GiB)] * 5)


@given(budgets, shapes_of_models, memories)
def test_slots_fit_in_what_is_left_or_the_missing_bytes_make_it_possible(budget, shapes, memory):
    config = AdapMoEConfig(**budget)
    refused = None
    try:
        slots = count_slots(config, shapes, memory)
    except AdapMoEError as error:
        refused = str(error)
    if refused is not None:
        missing = re.search(r" (\d+) bytes \(", refused)
        if missing is None:  # wrong, whatever the memory
            assert "set at" in refused
            return
        with pytest.raises(AdapMoEError):
            count_slots(config, shapes, replace(memory, usable=memory.usable + int(missing[1]) - 1))
        memory = replace(memory, usable=memory.usable + int(missing[1]))
        slots = count_slots(config, shapes, memory)
    assert bytes_of(shapes, slots) <= memory.left
    assert all(shape.top_k <= count <= shape.num_experts for shape, count in zip(shapes, slots, strict=True))


def test_activations_of_mixtral():
    """By hand: 4096 numbers of the hidden size, 14336 inside an expert, two experts a token, bfloat16."""
    size = {"hidden": 4096, "vocabulary": 32000, "inner": 14336, "top_k": 2, "dtype_bytes": 2}
    stream, pairs, logits = 2048 * 8 * 4096 * 2, 4096 * ((3 * 14336 + 2 * 4096) * 2 + 4 * 4096), 256 * 32000 * 22
    assert activation_bytes(tokens=2048, logit_rows=256, **size) == stream + pairs + logits + RUNTIME_BYTES
    assert activation_bytes(tokens=0, logit_rows=0, **size) == RUNTIME_BYTES


def test_a_pool_of_marlin_is_divided_below_32_gib_a_tensor():
    """DeepSeek-V3 in 4 bit on an H200: gate and up of an expert are 14 MiB, 5000 slots of them 68 GiB."""
    parts = split_layers(range(58), 5000, 14 << 20, 32 * GiB)
    assert [len(part) for part in parts] == [20, 19, 19]
    assert parts[0][:3] == [0, 3, 6]
    assert split_layers(range(58), 2340, 14 << 20, 32 * GiB) == [list(range(58))]
    assert len(split_layers(range(58), 2341, 14 << 20, 32 * GiB)) == 2  # 32 GiB to the byte would be one too many


@given(
    layers=st.integers(1, 100), experts=st.integers(1, 512), share=st.floats(0.01, 1), piece=st.integers(1, 64 << 20),
    limit=st.sampled_from([GiB, 4 * GiB, 32 * GiB]),
)  # fmt: skip
def test_no_tensor_of_a_divided_pool_reaches_the_limit(layers, experts, share, piece, limit):
    slots = max(1, int(layers * experts * share))
    parts = split_layers(range(layers), slots, piece, limit)
    assert sorted(layer for part in parts for layer in part) == list(range(layers))
    total = layers * experts * piece
    shapes = [ExpertShape(len(part) * experts, piece, 1) for part in parts]
    counts = [shape.num_experts * (slots * piece) // total for shape in shapes]  # as `count_slots` shares a budget
    assert sum(counts) > slots - len(parts)
    if len(parts) < layers:
        assert all(count * piece < limit for count in counts)
