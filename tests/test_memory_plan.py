"""What a budget buys: hand-computed cases, brute force over shares, and what must be monotone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.planning.memory_plan import (
    UTILIZATION,
    ModelSize,
    Reserve,
    Speed,
    StepSize,
    budgets,
    closed_form,
    curves_of,
    has_statistics,
    slots_for,
)
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape, choose_slots
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB, parse_bytes

MODEL = ModelSize(
    num_layers=3, num_experts=4, top_k=2, expert_bytes=100, other_bytes=500, read_bytes=400, all_layers=5
)  # fmt: skip
SPEED = Speed(link=1000.0, layer_seconds=0.1)
UNIFORM = curves_of(MODEL, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 << 30), ("1.5gib", 3 << 29), ("512MiB", 512 << 20), ("24GB", 24 * 10**9), ("7 MB", 7 * 10**6)],
)
def test_sizes(text, expected):
    assert parse_bytes("--memory", text) == expected


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24GiBs", "nanGiB", "1e99GiB", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OneLineError, match=r"--memory=.* is not a size; write 24GiB"):
        parse_bytes("--memory", text)


def test_slots_of_a_budget():
    assert slots_for(MODEL, 1000, Reserve(100)) == 4  # 1000 - 100 - 500 buys four
    assert slots_for(MODEL, 1000, Reserve(101)) == 3
    assert slots_for(MODEL, 1000, Reserve(share=0.1)) == 4  # a tenth of it
    assert slots_for(MODEL, 10**9, Reserve(share=0.1)) == 12  # no more than there are
    with pytest.raises(AdapMoEError, match=r"leaves 1 expert slots .* a token needs 2 at once; set at least --memory"):
        slots_for(MODEL, 799, Reserve(100))
    with pytest.raises(AdapMoEError, match="leaves 0 expert slots"):
        slots_for(MODEL, 10, Reserve(share=0.1))


@given(st.integers(2, 12), st.integers(0, 10**6), st.sampled_from([0.0, 0.08, 0.1]))
def test_memory_is_the_least_that_the_slots_fit_into(slots, nbytes, share):
    reserve = Reserve(nbytes, share)
    memory = reserve.memory(MODEL, slots)
    assert reserve.slots(MODEL, memory) == slots
    assert reserve.slots(MODEL, memory - 2) < slots


def test_the_memory_that_a_refusal_names_is_enough():
    big = ModelSize(32, 8, 2, 352_321_536, 3_211_264_000, 2_949_120_000, 32)
    with pytest.raises(AdapMoEError) as refused:
        slots_for(big, 3 << 30, Reserve(share=0.1))
    named = str(refused.value).rpartition("--memory ")[2]
    assert slots_for(big, parse_bytes("--memory", named), Reserve(share=0.1)) == 2


def test_a_gpu_is_planned_with_what_a_worker_chooses_its_slots_with():
    """Mixtral 8x7B in bf16 with 32768 tokens of KV cache, on 24 GiB: as many slots as `cache_gb=auto` takes."""
    size = ModelSize(32, 8, 2, 352_321_536, 3_211_264_000, 2_949_120_000, 32)
    step = StepSize(hidden=4096, inner=14336, vocabulary=32000, dtype_bytes=2, kv_bytes=131072, length=32768)
    reserve = Reserve.of_gpu(size, step)
    in_use, activations, kv_cache, graphs, bookkeeping = reserve.parts.values()
    memory = DeviceMemory(
        int(24 * GiB * UTILIZATION), in_use, size.other_bytes, activations, kv_cache, graphs=graphs,
        bookkeeping=bookkeeping,
    )  # fmt: skip
    shape = ExpertShape(size.experts, size.expert_bytes, size.top_k)
    (slots,), _ = choose_slots(AdapMoEConfig(), [shape], memory, memory)
    assert slots_for(size, 24 * GiB, reserve) == slots == 35
    assert kv_cache == 4 * GiB and graphs > GiB
    with pytest.raises(AdapMoEError, match=r"KV cache of 32768 tokens, .* CUDA graphs, .* lower --max-model-len, or"):
        slots_for(size, 8 * GiB, reserve)


def test_a_token_by_hand():
    # Three layers of two experts each. Eight slots: two stream, six stay; every second expert is there.
    half = closed_form(MODEL, UNIFORM, 8, SPEED)
    assert half.hits == pytest.approx(3) and half.loads == pytest.approx(3)
    assert half.fetched_bytes == pytest.approx(300)
    assert half.tokens_per_second == pytest.approx(1 / (5 * 0.1 + 0.3))
    # What just one token needs is no cache at all.
    assert closed_form(MODEL, UNIFORM, 2, SPEED).loads == pytest.approx(6)
    everything = closed_form(MODEL, UNIFORM, 12, SPEED)
    assert everything.loads == 0 and everything.tokens_per_second == pytest.approx(2)
    assert everything.shares == [4, 4, 4]
    # Computing takes as long as reading 400 bytes and the six experts.
    estimated = closed_form(MODEL, UNIFORM, 12, Speed(1000.0, None, 2000.0))
    assert estimated.tokens_per_second == pytest.approx(2000 / (400 + 600))


@pytest.mark.parametrize(("host", "seconds"), [(12, 0.3), (4, 0.3), (2, 0.15 + 0.15 * 4), (0, 1.2), (None, 0.3)])
def test_host_memory_between_slots_and_disk(host, seconds):
    """Eight of twelve experts are in slots: host memory for four holds all others, for two every second one."""
    tiered = Speed(1000.0, 0.1, host_experts=host, disk=250.0)
    estimate = closed_form(MODEL, UNIFORM, 8, tiered)
    assert estimate.tokens_per_second == pytest.approx(1 / (5 * 0.1 + seconds))
    assert estimate.fetched_bytes == pytest.approx(300)
    fast_disk = closed_form(MODEL, UNIFORM, 8, replace(tiered, disk=9e9))
    assert fast_disk.tokens_per_second == pytest.approx(1 / (5 * 0.1 + 0.3)), "the link is on the way as well"


@given(st.lists(st.floats(1, 2), min_size=3, max_size=3), st.integers(2, 11))
def test_shares_are_the_best_there_are(kept, slots):
    curves = [k * (1 - np.arange(5) / 4) for k in kept]
    found = closed_form(MODEL, curves, slots, SPEED)
    best = min(
        sum(curve[share] for curve, share in zip(curves, shares, strict=True))
        for shares in itertools.product(range(5), repeat=3)
        if sum(shares) == slots - MODEL.top_k
    )
    assert found.loads == pytest.approx(best)
    assert found.hits + found.loads == pytest.approx(sum(kept))
    uniform = closed_form(MODEL, curves, slots, SPEED, "uniform")
    assert uniform.loads >= found.loads - 1e-9
    assert max(uniform.shares) - min(uniform.shares) <= 1


@pytest.mark.parametrize("threshold", [0.0, 0.005])
def test_more_memory_is_never_slower(threshold):
    profile = ModelProfile.load(ROOT / "configs" / "tiny_mixtral.json")
    model = ModelSize(12, 8, 2, 196_608, 2_000_000, 1_500_000, 12)
    curves = curves_of(model, profile, threshold)
    points = [closed_form(model, curves, slots, Speed(1e9, 0.001)) for slots in range(2, 97)]
    speeds = [point.tokens_per_second for point in points]
    assert speeds == sorted(speeds) and points[-1].loads == 0
    assert all(a.loads >= b.loads for a, b in itertools.pairwise(points))
    if threshold:  # gating never makes it slower, and keeps what the profile says
        ungated = curves_of(model, profile)
        assert all(
            closed_form(model, ungated, slots, Speed(1e9, 0.001)).loads >= point.loads
            for slots, point in enumerate(points, start=2)
        )
        assert points[0].hits + points[0].loads == pytest.approx(sum(profile.layer_experts(threshold)))


def test_constants_say_nothing_of_routing():
    published = ModelProfile.load(ROOT / "configs" / "mixtral_8x7b.json")
    assert not has_statistics(published) and not has_statistics(None)
    assert has_statistics(ModelProfile.load(ROOT / "configs" / "tiny_mixtral.json"))
    model = ModelSize(32, 8, 2, 10, 10, 10, 32)
    assert [curve[0] for curve in curves_of(model, published)] == [2] * 32


def test_rows():
    assert budgets(MODEL, None, 4) == [3, 6, 9, 12]
    assert budgets(MODEL, 4, 4) == [3, 4, 6, 9, 12]
    assert budgets(MODEL, 6, 12) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
