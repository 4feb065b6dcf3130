"""The model of decode costs: limits, what is monotone, and where two ways cost the same."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.decode_shapes import GPUS, MODELS
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.planning.decode_cost import (
    PREDICTING_KERNELS,
    PREFETCH_KERNELS,
    GpuSpeed,
    break_even_bandwidth,
    decided_on_device,
    decided_on_host,
    device_faster_from,
    layer_costs,
    llama_cpp,
    misses_on_host,
    overtaking_hit_rate,
    stock_seconds,
    uva,
)
from vllm_adapmoe.planning.memory_plan import Speed, closed_form, curves_of
from vllm_adapmoe.planning.token_time import DECIDING_KERNELS, KERNEL_LINK, kernel_bandwidth, token_seconds

SHARES = st.floats(0, 1)
models = st.sampled_from(MODELS)
gpus = st.builds(
    GpuSpeed,
    name=st.just("some"),
    memory_bandwidth=st.floats(2e11, 8e12),
    link=st.floats(1e9, 1e11),
    fetch_share=st.floats(0.2, 1),
    kernel_seconds=st.floats(0, 1e-5),
    sync_seconds=st.floats(0, 1e-4),
)


def deciding(model, gpu):
    return model.size.num_layers * DECIDING_KERNELS * gpu.kernel_seconds


def test_sizes_of_the_published_models():
    """Against the sizes of the published checkpoints, experts and the rest: 24.7, 31.2, 61.1 and 65.2 GB."""
    sizes = [model.size for model in MODELS]
    totals = [size.experts * size.expert_bytes + size.other_bytes for size in sizes]
    assert [total / 1e9 for total in totals] == pytest.approx([24.6, 31.1, 61.1, 71.0], rel=0.01)
    # gpt-oss as published, without Marlin's padding of 2880 to 3072 and 2944.
    unpadded = sizes[3].experts * (3 * 2880 * 2880 * 4.25 / 8 + 2 * 3 * 2880) + sizes[3].other_bytes
    assert unpadded / 1e9 == pytest.approx(65.2, rel=0.01)
    assert sizes[2].expert_bytes == 3 * 2048 * 768 * 2
    # Qwen3-30B-A3B has 3.3e9 active weights, the input's row of the embedding table aside.
    read = sizes[2].read_bytes + MODELS[2].expert_bytes
    assert read / 2 / 1e9 == pytest.approx(3.3 - 151_936 * 2048 / 1e9, rel=0.03)


def test_a_kernel_gets_a_part_of_a_fast_link_only():
    assert kernel_bandwidth(25e9) == 25e9 and kernel_bandwidth(55e9) == KERNEL_LINK
    fetching = [gpu.fetch_bandwidth for gpu in GPUS]
    assert fetching == pytest.approx([25e9, 37e9])


@given(models, gpus, SHARES, SHARES)
def test_more_hits_are_never_slower(model, gpu, one, other):
    low, high = sorted((one, other))
    for seconds in (
        decided_on_device,
        lambda *point: decided_on_device(*point, prefetch=True),
        lambda *point: decided_on_device(*point, prefetch=True, recall=0.7, precision=0.5),
        decided_on_host,
    ):
        assert seconds(model, gpu, high) <= seconds(model, gpu, low) * (1 + 1e-9)


@given(models, gpus, SHARES)
def test_limits(model, gpu, hit_rate):
    stock, launches = stock_seconds(model, gpu), deciding(model, gpu)
    assert decided_on_device(model, gpu, 1.0) == pytest.approx(stock + launches)
    endless = replace(gpu, link=math.inf)
    assert decided_on_device(model, endless, 0.0) == pytest.approx(stock + launches)
    assert uva(model, gpu, 1.0) == llama_cpp(model, gpu, 1.0, 6e10) == stock
    everything = model.expert_bytes / gpu.fetch_bandwidth
    assert decided_on_device(model, gpu, 0.0) == pytest.approx(stock + launches + everything)
    # A missing expert crosses the link either way; UVA's kernel reads it there, ours once more from its slot.
    more = launches + (1 - hit_rate) * model.expert_bytes / gpu.memory_bandwidth
    assert decided_on_device(model, gpu, hit_rate) - uva(model, gpu, hit_rate) == pytest.approx(more, abs=1e-12)


@given(models, gpus, SHARES, SHARES)
def test_prefetch_hides_no_more_than_computing(model, gpu, hit_rate, recall):
    alone = decided_on_device(model, gpu, hit_rate)
    best = decided_on_device(model, gpu, hit_rate, prefetch=True)
    window = stock_seconds(model, gpu) - model.size.num_layers * PREFETCH_KERNELS * gpu.kernel_seconds
    missing = alone - decided_on_device(model, gpu, 1.0)
    predicting = model.size.num_layers * PREDICTING_KERNELS * gpu.kernel_seconds
    assert alone + predicting - best == pytest.approx(min(missing, max(0.0, window)), abs=1e-12)
    assert best <= decided_on_device(model, gpu, hit_rate, prefetch=True, recall=recall) * (1 + 1e-9)
    assert decided_on_device(model, gpu, hit_rate, prefetch=True, recall=0.0) == pytest.approx(alone + predicting)


@given(models, gpus, SHARES)
def test_the_break_even_is_where_both_times_cross(model, gpu, hit_rate):
    assume(hit_rate < 0.999)
    bandwidth = break_even_bandwidth(model, gpu, hit_rate)
    device = decided_on_device(model, gpu, hit_rate)
    if math.isinf(bandwidth):
        assert misses_on_host(model, gpu, hit_rate, 1e18) >= device * (1 - 1e-9)
        return
    assert misses_on_host(model, gpu, hit_rate, bandwidth) == pytest.approx(device, rel=1e-6)
    assert (
        misses_on_host(model, gpu, hit_rate, 2 * bandwidth)
        < device
        < misses_on_host(model, gpu, hit_rate, bandwidth / 2)
    )
    assert break_even_bandwidth(model, replace(gpu, sync_seconds=gpu.sync_seconds / 2), hit_rate) <= bandwidth


def test_without_a_handover_the_break_even_is_about_the_link():
    gpu = GpuSpeed("some", math.inf, 25e9, 1.0, kernel_seconds=0.0, sync_seconds=0.0)
    for model in MODELS:
        assert break_even_bandwidth(model, gpu, 0.5) == pytest.approx(25e9)
        assert math.isinf(break_even_bandwidth(model, gpu, 1.0))


@given(models, gpus, SHARES, st.floats(1e10, 1e12))
def test_where_the_device_overtakes(model, gpu, resident, host):
    for seconds in (uva(model, gpu, resident), llama_cpp(model, gpu, resident, host)):
        rate = overtaking_hit_rate(model, gpu, seconds)
        if rate is None:
            assert decided_on_device(model, gpu, 1.0) > seconds
        elif rate == 0:
            assert decided_on_device(model, gpu, 0.0) <= seconds * (1 + 1e-9)
        else:
            assert decided_on_device(model, gpu, rate) == pytest.approx(seconds)


@given(models, gpus)
def test_where_the_device_is_faster_than_the_host(model, gpu):
    rate = device_faster_from(model, gpu)
    assert 0 <= rate <= 1
    if rate > 0:
        assert decided_on_device(model, gpu, rate) == pytest.approx(decided_on_host(model, gpu, rate))
    else:
        assert decided_on_device(model, gpu, 0.0) <= decided_on_host(model, gpu, 0.0) * (1 + 1e-9)


@given(models, SHARES)
def test_launches_and_bytes_of_a_layer(model, share):
    costs = layer_costs(model, share, share)
    stock, device, host = costs["stock"], costs["device"], costs["host"]
    assert device.kernels - stock.kernels == DECIDING_KERNELS and costs["device_prefetch"].side_kernels == 1
    assert costs["device_prefetch"].kernels - device.kernels == PREDICTING_KERNELS
    assert device.syncs == device.copies == stock.link == 0 and host.syncs == 1
    assert host.copies == 1 + math.ceil((1 - share) * model.size.top_k - 1e-9)
    assert device.link == device.device_written == host.link == pytest.approx((1 - share) * model.layer_expert_bytes)
    for way in ("uva", "llama_cpp"):  # every expert is read once, wherever it is
        cost = costs[way]
        experts = cost.link if way == "uva" else cost.host_read
        assert cost.device_read + experts == pytest.approx(stock.device_read)


@given(models, st.integers(0, 1))
def test_plan_has_the_same_formula(model, half):
    """The closed form of `adapmoe plan` is `decided_on_device` at the hit rate that it expects."""
    gpu = GpuSpeed.of("some", 1e12, 5e10)
    size = model.size
    slots = size.experts // 2 if half else size.experts // 4
    speed = Speed(gpu.link, weights=gpu.memory_bandwidth).decided_on_device()
    estimate = closed_form(size, curves_of(size, None), slots, speed)
    hit_rate = estimate.hits / (estimate.hits + estimate.loads)
    assert 1 / estimate.tokens_per_second == pytest.approx(decided_on_device(model, gpu, hit_rate))
    everything = closed_form(size, curves_of(size, None), size.experts, speed)
    assert 1 / everything.tokens_per_second == pytest.approx(stock_seconds(model, gpu))
    by_host = closed_form(size, curves_of(size, None), slots, Speed(gpu.link, None, 1e12).decided_on_host())
    assert 1 / by_host.tokens_per_second == pytest.approx(decided_on_host(model, gpu, hit_rate))


def test_what_is_hidden_is_no_longer_than_what_is_moved():
    assert token_seconds(1.0, 0.5, 0.25) == 1.75
    assert token_seconds(1.0, 0.5, 0.25, beside=0.25) == 1.5
    assert token_seconds(1.0, 0.5, 0.25, beside=9.0) == 1.25


def test_the_command(tmp_path):
    run = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["decode_cost", "-o", str(tmp_path / "result.json")])
    assert run.exit_code == 0, run.exception
    assert max(map(len, run.output.splitlines())) <= 80 and "…" not in run.output
    assert "computed" in run.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["basis"].startswith("computed by") and result["environment"]["command"]
    assert len(result["points"]) == len(MODELS) * len(GPUS)
    ratios = [row["ratio"] for row in result["measured"]]
    assert min(ratios) > 0.7 and max(ratios) < 1.1
    refused = CliRunner().invoke(app, ["decode_cost", "--host-gbps", "0,60"]).exception
    assert isinstance(refused, AdapMoEError) and "--host-gbps" in str(refused)
