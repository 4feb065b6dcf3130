"""The GPU check on the CPU, in Triton's interpreter: what it finds, and that planted faults do not pass."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks.gpu_check import (
    check,
    device_rows,
    engines,
    kernel_rows,
    published,
    records,
    slot_rows,
    tokens,
    vllm_kernel_rows,
)
from benchmarks.gpu_check.__main__ import main, run
from benchmarks.gpu_check.decode import Limits, check_decode
from benchmarks.gpu_check.decoding import Inputs, OnDevice
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.engine_process import MARK, SPEED, EngineFailed, EngineProcess
from benchmarks.gpu_check.report import MET, MISSED, NOT_RUN, SKIPPED, Result, Row, attempt, failed, render
from benchmarks.gpu_check.routing import curves, draw_tokens
from benchmarks.gpu_check.shapes import MIXTRAL, QWEN3, Shape
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import fetch
from vllm_adapmoe.device.decode import DeviceDecode
from vllm_adapmoe.integration.compat import runs_quantised_experts
from vllm_adapmoe.policy.cache_setup import CacheSetup

CPU = Device("cpu")
TINY = Shape("tiny", 3, 8, 2, 64, 32, recall=(0.0, 0.8, 0.8), single=(0.1, 0.5, 0.9))
PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "adapmoe_published.json").read_text())["mixtral_8x7b"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.engine
def test_all_of_it(tmp_path):
    """Correctness is met, everything but vLLM is run, and table and JSON can be read."""
    spec = check.CheckSpec(shapes=(TINY,), dtype=torch.float16, seed=7, batches=(1, 4), warm=1, tokens=2)
    rows = [row for part in check.run_check(CPU, spec) for row in part]
    assert {row.section for row in rows} == {"correctness", "copies", "decode", "vllm"}
    assert [row.verdict for row in rows if row.section == "correctness"] == [MET] * 7
    assert [row.section for row in rows if row.verdict in (NOT_RUN, SKIPPED)] == ["vllm"]
    assert not failed(rows)
    decoded = [row.details for row in rows if "per_token" in row.details]
    assert len(decoded) == 3 * (4 + 4)
    assert all(len(one["seconds"]) == 2 and one["floor_seconds"] > 0 for one in decoded)
    (slots,) = (row.details for row in rows if "slots hold" in row.what)
    assert slots["misses"] > slots["slots"], "slots were refilled"
    (on_device,) = (row.details for row in rows if "on the device, in a graph, has" in row.what)
    assert on_device["misses"] > 0 and on_device["hits"] > on_device["prefetch_hits"] > 0
    (asking,) = (row.details for row in rows if "the GPU asking" in row.what)
    assert asking["misses"] == 0 and len(asking["seconds"]["asking"]) == 2
    hits, misses = (row.details for row in rows if "deciding one layer" in row.what and row.details["hits"] in (0, 2))
    assert (hits["misses"], misses["misses"]) == (2, 0), "of two experts"
    lines = render(rows, "title").splitlines()
    assert len(lines) == len(rows) + 4 and "half of them fetched by the GPU" in lines[4]
    path = tmp_path / "result.json"
    result = Result(path, "title", {"command": "this", "device": {"name": "cpu"}}, 7)
    result.add(rows[:3])
    assert json.loads(path.read_text())["complete"] is False
    result.add(rows[3:])
    assert result.end() == 0
    said = json.loads(path.read_text())
    assert said["complete"] and len(said["rows"]) == len(rows) and said["environment"]["command"] == "this"
    assert "commit" in said["environment"] and said["seed"] == 7


@pytest.mark.engine
def test_few_layers_fit_and_experts_share_records():
    nbytes = TINY.layout(torch.float16).nbytes
    limits = Limits(5 * nbytes, 12 * nbytes, warm=0, tokens=1)
    rows = list(check_decode(TINY, CPU, torch.float16, 1, limits))
    assert "2 of 3 layers, 16 experts" in rows[0].what and "sharing 5 host records" in rows[0].figure
    assert rows[0].details["layers_of_the_model"] == 3
    late = list(check_decode(TINY, CPU, torch.float16, 1, replace(limits, ends=time.monotonic())))
    assert [row.figure for row in late if row.verdict == NOT_RUN] == ["out of time"] * 24
    no_room = attempt("decode", "tiny", lambda: check_decode(TINY, CPU, torch.float16, 1, Limits(0, 0)))
    assert [(row.verdict, row.figure) for row in no_room] == [
        (NOT_RUN, "MemoryError: no room for one layer of tiny and one record")
    ]


# Planted faults


def test_two_slots_exchanged(monkeypatch):
    def exchanged(slots, device):
        return records.map_of([slots[1], slots[0], *slots[2:]], device)

    monkeypatch.setattr(kernel_rows, "map_of", exchanged)
    rows = list(kernel_rows.check_kernel(TINY, CPU, torch.float16, 3, (4,)))
    assert rows[0].verdict == MISSED and failed(rows)


def kernel_rows_verdicts():
    return [row.verdict for row in kernel_rows.check_kernel(TINY, CPU, torch.float16, 3, (16,))]


def test_host_copy_of_another_expert(monkeypatch):
    put = records.PinnedRecords.put
    monkeypatch.setattr(records.PinnedRecords, "put", lambda self, index, weights: put(self, index ^ 2, weights))
    assert kernel_rows_verdicts() == [MISSED, MISSED]


def test_one_byte_of_a_slot_is_wrong(monkeypatch):
    wait = ExpertCacheManager.wait
    events = []

    def spoil(self, acquisition):
        slots = wait(self, acquisition)
        layer, experts = acquisition.layer, acquisition.experts
        events.append(layer)
        if len(events) == 9:
            self.pool(layer).tensors["w2_weight"][slots[experts[0]]].view(torch.uint8).view(-1)[17] ^= 1
        return slots

    monkeypatch.setattr(ExpertCacheManager, "wait", spoil)
    row = next(slot_rows.check_slots(TINY, CPU, torch.float16, 3))
    assert row.verdict == MISSED and not row.figure.startswith("0 of")


def test_a_wave_reads_other_slots(monkeypatch):
    def flipped(*args):
        gate_up, down, row_of = right(*args)
        return gate_up, down, row_of[:-1].flip(0)

    right = slot_rows.slots_of
    monkeypatch.setattr(slot_rows, "slots_of", flipped)
    assert next(slot_rows.check_waves(TINY, CPU, torch.float16, 3)).verdict == MISSED


def test_steps_on_the_device_read_other_slots(monkeypatch):
    right = DeviceDecode.experts

    def other_slots(self, *args):
        row_of, ids = right(self, *args)
        return row_of[:-1].roll(1), ids

    monkeypatch.setattr(DeviceDecode, "experts", other_slots)
    outputs, counters = device_rows.check_on_device(TINY, CPU, torch.float16, 3)
    assert (outputs.verdict, counters.verdict) == (MISSED, MET)


def test_the_device_does_not_copy_what_it_misses(monkeypatch):
    monkeypatch.setattr(fetch.Fetch, "__call__", lambda self, loads, kind: None)
    outputs, _ = device_rows.check_on_device(TINY, CPU, torch.float16, 3)
    assert outputs.verdict == MISSED
    assert kernel_rows_verdicts() == [MISSED, MISSED]


def test_the_device_decides_otherwise(monkeypatch):
    """It forgets the predictions of one token in two: what it computes is right, and what it counts is not."""
    step = OnDevice.replay_token

    def forgetful(self, number):
        self.inputs.ahead[number] = -1 if number % 2 else self.inputs.ahead[number]
        return step(self, number)

    replay = device_rows.replay
    predictions = []

    def remember(shape, tokens, *rest):
        inputs = Inputs(shape, tokens, *rest)
        predictions.append(inputs.ahead.clone())
        return inputs

    def with_all(controller, inputs):
        inputs.ahead = predictions[0]
        return replay(controller, inputs)

    monkeypatch.setattr(OnDevice, "replay_token", forgetful)
    monkeypatch.setattr(device_rows, "Inputs", remember)
    monkeypatch.setattr(device_rows, "replay", with_all)
    outputs, counters = device_rows.check_on_device(TINY, CPU, torch.float16, 3)
    assert (outputs.verdict, counters.verdict) == (MET, MISSED) and "prefetches" in counters.figure


def test_a_slot_is_refilled_too_early(monkeypatch):
    caches, busy = [], []

    def remember(*args):
        caches.append(open_cache(*args))
        return caches[-1]

    class Early(Device):
        def keep_busy(self):
            busy.append(True)
            if len(busy) == 3:
                caches[0].pool(0).tensors["w2_weight"].zero_()

    open_cache = slot_rows.open_cache
    monkeypatch.setattr(slot_rows, "open_cache", remember)
    row = next(slot_rows.check_refills(TINY, Early("cpu"), torch.float16, 3))
    assert row.verdict == MISSED and row.figure.startswith("3 of 4")


@pytest.mark.engine
def test_a_part_that_fails_leaves_the_others(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such slot\nand more")

    for name in ("check_kernel", "check_copies", "check_decode"):
        monkeypatch.setattr(check, name, fail)
    spec = check.CheckSpec(shapes=(TINY,), dtype=torch.float16, seed=7)
    rows = [row for part in check.run_check(CPU, spec) for row in part]
    assert [row.figure for row in rows].count("RuntimeError: no such slot") == 3
    assert [row.verdict for row in rows if "slots hold" in row.what or "waves" in row.what] == [MET, MET]
    assert failed(rows), "correctness that could not be run is not met"


def test_only_the_parts_that_are_asked_for(monkeypatch, capsys):
    ran = []
    for name in ("check_kernel", "check_slots", "check_waves", "check_refills", "check_on_device"):
        monkeypatch.setattr(check, name, lambda *args: ran.append("kernels") or [])
    for name in ("copies", "decode"):
        monkeypatch.setattr(check, f"check_{name}", lambda *args, name=name: ran.append(name) or [])
    for part in ("kernels", "copies", "decode"):
        ran.clear()
        spec = check.CheckSpec(shapes=(TINY,), dtype=torch.float16, seed=7, parts=(part,))
        assert list(check.run_check(CPU, spec))[-1:] == [[]] and set(ran) == {part}
    spec = check.CheckSpec(shapes=(TINY,), dtype=torch.float16, seed=7, parts=("tokens",))
    ((row,),) = check.run_check(CPU, spec)
    assert row.verdict == SKIPPED
    assert run(Path("unused"), 1, "tokens,copy") == 2
    assert "no part 'copy'; there are kernels, tokens, copies, decode, engines" in capsys.readouterr().err


HANGS = """
import sys, time
from pathlib import Path
from benchmarks.gpu_check.report import Result
result = Result(Path(sys.argv[1]), "title", {}, 1)
with result.ended_after(0.5):
    time.sleep(600)
"""


def test_a_device_path_that_hangs(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-c", HANGS, str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "still running after" in done.stdout and "most recent call first" in done.stderr
    assert json.loads(path.read_text())["rows"][0]["verdict"] == NOT_RUN


# What is drawn


def test_published_figures():
    assert list(published.PREFETCH_RECALL) == PUBLISHED["prefetch_recall"]
    assert list(published.SINGLE_EXPERT_RATIO) == PUBLISHED["single_expert_ratio"]
    assert MIXTRAL.layout(torch.bfloat16).nbytes == 336 << 20
    assert QWEN3.layout(torch.bfloat16).nbytes == 9 << 20


def test_tokens_follow_the_published_statistics():
    tokens = draw_tokens(MIXTRAL, 2000, 5)
    kept = np.stack([token.kept for token in tokens])
    assert kept[:, :, 0].all()
    assert np.abs((~kept[:, :, 1]).mean(0) - MIXTRAL.single).max() < 0.05
    ids, predicted = np.stack([token.ids for token in tokens]), np.stack([token.predicted_ids for token in tokens])
    correct = (ids[..., :, None] == predicted[..., None, :]).any(-1)
    assert np.abs(correct.mean((0, 2)) - MIXTRAL.recall).max() < 0.05
    assert all(len(set(row)) == 2 for row in predicted.reshape(-1, 2).tolist())
    assert np.bincount(ids.ravel()).std() < 0.02 * ids.size / 8
    loads = sum(curve[4] for curve in curves(MIXTRAL, True, 1))
    assert loads == pytest.approx(8.95872546515454), "the published cost of four slots a layer"


def test_store_of_shared_records():
    store = records.PinnedRecords(TINY.layout(torch.float16), 3, 8, 5, CPU)
    weights = records.expert(TINY, torch.float16, CPU, 1, (1, 2))
    store.put(0, weights)
    into = [torch.empty_like(one) for one in weights.values()]
    store.read((0, 5), into)
    assert all(torch.equal(one, other) for one, other in zip(into, weights.values(), strict=True))
    assert store.page_locked((0, 5)).data_ptr() == store.page_locked((1, 2)).data_ptr()
    slots = CacheSetup([8], "lru")
    cache = slot_rows.open_cache(store, TINY, slots, CPU)
    cache.acquire(2, [4])
    assert torch.equal(cache.pool(2).tensors["w2_weight"][cache.slot_maps[2][4]], weights["w2_weight"])
    cache.close()


# The command

BARE = """
import sys
import numpy, torch, triton
import torch.nn.functional

for name in [name for name in sys.modules if name.partition(".")[0] == "tqdm"]:
    del sys.modules[name]  # torch takes it where it is
there = {name.partition(".")[0] for name in sys.modules}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("vllm_adapmoe", "benchmarks") and top not in there:
            raise ImportError(f"{name} is not on a bare machine")
sys.meta_path.insert(0, Nothing())
assert not there & {"pydantic", "typer", "rich", "vllm", "transformers", "psutil", "blake3"}, there

from benchmarks.gpu_check import check
from benchmarks.gpu_check import decode
from benchmarks.gpu_check import engines
from benchmarks.gpu_check import kernel_rows
from benchmarks.gpu_check import slot_rows
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.shapes import Shape
from vllm_adapmoe.results import environment

torch.set_num_threads(1)
shape, device = Shape("tiny", 2, 8, 2, 32, 16), Device("cpu")
common = shape, device, torch.float16, 1
for one in (kernel_rows.check_kernel(*common, (1,)), slot_rows.check_slots(*common)):
    assert all(row.verdict == "met" for row in one)
assert list(decode.check_decode(*common, decode.Limits(1 << 20, 1 << 20, warm=0, tokens=1)))
environment()
try:
    import pydantic
except ImportError:
    print("bare")
"""


def test_needs_torch_triton_and_numpy_only():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.stdout == "bare\n", done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_says_that_there_is_no_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "-o", str(tmp_path / "result.json")])
    assert main() == 2
    said = capsys.readouterr().err
    assert said == f"gpu-check: no CUDA device found by torch {torch.__version__}; nothing was run\n"
    assert not list(tmp_path.iterdir())


# vLLM


class NoCuda(Device):
    """Takes itself for a GPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.cuda = True

    def give_back(self) -> None:
        pass


def only_engines(monkeypatch, free_bytes: int = 64 << 30) -> list[Row]:
    """What the check says of engines on a device with so much memory, without its other parts."""
    for name in ("check_kernel", "check_slots", "check_waves", "check_refills", "check_on_device", "check_copies",
                 "check_decode"):  # fmt: skip
        monkeypatch.setattr(check, name, lambda *args: [])
    monkeypatch.setattr(NoCuda, "free_bytes", lambda self: free_bytes)
    monkeypatch.setattr(check, "host_memory", lambda: SimpleNamespace(available=64 << 30))
    monkeypatch.setattr(tokens.torch.cuda, "get_device_capability", lambda device: (8, 0))
    spec = check.CheckSpec(shapes=(TINY,), dtype=torch.bfloat16, seed=7)
    return [row for part in check.run_check(NoCuda(), spec) for row in part]


def test_without_vllm_engines_are_skipped_and_without_the_plugin_that_fails(monkeypatch):
    monkeypatch.setattr(engines, "entry_points", lambda group: [])
    (row,) = only_engines(monkeypatch)
    assert "not installed in vLLM's environment" in row.figure and row.verdict == NOT_RUN and failed([row])
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    (row,) = only_engines(monkeypatch)
    assert (row.figure, row.verdict) == ("vLLM not importable", SKIPPED) and not failed([row])


def test_engines_that_cannot_be_run_fail(monkeypatch):
    """A process that ends at once, with vLLM installed: not run, for each, and the check fails."""

    class Broken:
        def __init__(self, *args):
            raise EngineFailed("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tokens, "EngineProcess", Broken)
    monkeypatch.setattr(tokens, "write_checkpoint", lambda *args: None)
    monkeypatch.setattr(engines, "EngineProcess", Broken)
    monkeypatch.setattr(vllm_kernel_rows, "EngineProcess", Broken)
    rows = only_engines(monkeypatch)
    assert len(rows) == len(tokens.CONTENDERS) + 3
    assert {row.verdict for row in rows} == {NOT_RUN} and all(failed([row]) for row in rows)
    assert "illegal memory access" in rows[0].figure


GIB = 1 << 30


def test_memory_of_24_gib_and_less(monkeypatch):
    """Engines beside each other, and how many layers they have, by what is free."""
    assert tokens.engines_together(23 * GIB, 16) == 8 and tokens.engines_together(23 * GIB, 6) == 3
    assert tokens.engines_together(7 * GIB, 16) == 2 and tokens.engines_together(4 * GIB, 1) == 1
    with pytest.raises(MemoryError, match=r"2\.0 GiB of the device are free, an engine needs 3\.5"):
        tokens.engines_together(2 * GIB, 16)
    host = 64 * GIB
    for free, layers in ((78, 8), (23, 4), (18, 4)):
        shape = engines.fitting(QWEN3, free * GIB, host)
        assert shape.layers == layers
        for fraction in (1.0, *engines.FRACTIONS):
            together = 1 + len(engines.contenders_of(fraction))
            assert together * engines.engine_bytes(shape, fraction) < free * GIB
    assert engines.fitting(QWEN3, 78 * GIB, 20 * GIB).layers == 4, "the host bounds it, too"
    with pytest.raises(MemoryError, match=r"4 layers need 17.7 GiB of the device .* 11.0 and 64.0 are"):
        engines.fitting(QWEN3, 11 * GIB, host)
    monkeypatch.setattr(check, "check_tokens", lambda *args: [])
    monkeypatch.setattr(check, "check_vllm_kernels", lambda *args: [])
    monkeypatch.setattr(engines, "LAYERS", (8, 10**6))
    (row,) = only_engines(monkeypatch, 4 * GIB)
    assert row.verdict == SKIPPED and "4.0 and 64.0 are free" in row.figure and not failed([row])


def said(tokens_of: list[int], logprobs: list[float], **others):
    """What an engine answers, of one prompt."""
    answer = [(tokens_of, [[value, value, token] for token, value in zip(tokens_of, logprobs, strict=True)])]
    return {
        "runner": "V2", "graphs": "FULL", "kernels": ["TritonExperts"], "alone": answer, "together": answer,
        "forced": answer, "forced_again": answer, "cache": {"misses": 3.0}, "repeats": True, "on_device": True,
    } | others  # fmt: skip


def judged(one: tokens.Contender, found, stock, noisy=None) -> str:
    eager = None if noisy is None else stock | {"noisy": noisy["alone"]}
    return tokens.compare_row(tokens.Plan(prompts=(90,)), one, found, stock, eager).verdict


def test_what_is_promised_of_engines():
    stock, logits = said([5, 6, 7], [-1.0, -2.0, -3.0]), [-1.0, -2.0, -3.001]
    bits, graphs, waves, device = (
        tokens.Contender("bf16", 0.5, *rest)
        for rest in (
            (tokens.SAME_BITS,), (tokens.ROUNDING, "host", False), (tokens.ROUNDING,),
            (tokens.ROUNDING, "device", False),
        )
    )  # fmt: skip
    assert judged(bits, stock, stock) == MET
    eager = replace(bits, decode="device")
    assert judged(eager, stock, stock) == MET and judged(eager, said([5, 6, 7], logits), stock) == MISSED
    assert judged(eager, stock | {"on_device": False}, stock) == MISSED, "the host decided"
    assert judged(bits, said([5, 6, 7], logits), stock) == MISSED, "the last bit"
    assert judged(bits, said([5, 6, 7], [-1.0, -2.0, -3.0], kernels=["MarlinExperts"]), stock) == MISSED
    batch = {"together": said([5, 6, 8], [-1.0, -2.0, -3.0])["alone"]}
    assert judged(bits, stock | batch, stock) == MISSED
    unsteady = stock | {"repeats": False}
    assert judged(bits, stock | batch, unsteady) == MET, "stock's own batches differ"
    assert judged(bits, said([5, 6, 7], logits), unsteady) == MISSED, "alone they do not"
    noisy = said([5, 6, 7], [-1.0, -2.0, -3.01])
    near, far = said([5, 6, 7], [-1.0, -2.005, -3.0]), said([5, 6, 7], [-1.0, -2.0, -3.05])
    for one in (graphs, waves, device):
        assert judged(one, near, stock, noisy) == MET and judged(one, far, stock, noisy) == MISSED
        assert judged(one, said([5, 6, 7], [float("nan")] * 3), stock, noisy) == MISSED
    for one in (graphs, waves, device):
        assert judged(one, near | {"forced_again": stock["alone"]}, stock, noisy) == MISSED, "not the same again"
    one, two = tokens.CONTENDERS[8:10]
    (row,) = tokens.agreement_rows([(one, stock), (two, stock)])
    assert one.decode == two.decode == "device" and row.verdict == MET
    for wrong in (near, stock | {"forced_again": near["alone"]}, stock | {"cache": {}}, stock | {"on_device": False}):
        assert [row.verdict for row in tokens.agreement_rows([(one, stock), (two, wrong)])] == [MISSED]


@pytest.mark.engine
def test_an_engine_that_ends_says_why(tmp_path):
    """Here: an argument is missing."""
    process = EngineProcess(SPEED, [str(tmp_path), "stock", "1.0", "1"], time.monotonic() + 60)
    with pytest.raises(EngineFailed, match="required: tokens, device_bytes"):
        process.decode()
    process.close()


@pytest.mark.engine
def test_vllms_kernels_on_slots():
    """In the interpreter: as they are, with the slots of two experts exchanged, and with vLLM's own sorting."""
    command = [sys.executable, str(Path(__file__).parent / "run_vllm_kernel_rows.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["right"] == [MET] * 2 and results["exchanged"] == [MISSED] * 2
    assert "pairs counted in bin" in results["own sorting"]


ENGINES_OF_TESTS = tokens.Plan(
    Shape("tiny", 2, 8, 2, 128, 128), 512, (5, 70), 6,
    [
        *(tokens.Contender(kind, 0.5, tokens.SAME_BITS) for kind in ("bf16", "fp8", "gptq")),
        tokens.Contender("bf16", 0.25, tokens.ROUNDING),
    ],
)  # fmt: skip
FAULT = """
import sys
if sys.argv[0] == "-m":  # an engine's process: of two experts that are asked for each has the other's slot
    from vllm_adapmoe.cache.manager import ExpertCacheManager

    arriving = ExpertCacheManager._arriving

    def swapped(self, acquisition):
        yield from arriving(self, acquisition)
        if len(acquisition.experts) > 1:
            one, two = list(acquisition.experts)[:2]
            slots = self.slot_maps[acquisition.layer]
            slots[one], slots[two] = slots[two].clone(), slots[one].clone()

    ExpertCacheManager._arriving = swapped
"""


@pytest.mark.engine
def test_tokens_of_engines():
    """Real engines on the CPU: three formats are stock's to the last bit, waves but for rounding."""
    rows = list(tokens.check_tokens(CPU, 1, time.monotonic() + 500, ENGINES_OF_TESTS))
    bf16, *quantised, waves = rows
    assert bf16.verdict == waves.verdict == MET, [row.figure for row in rows]
    if runs_quantised_experts():
        assert {row.verdict for row in quantised} == {MET}, [row.figure for row in rows]
    else:  # vLLM has no kernel for them, and that is what the rows say
        assert {row.verdict for row in quantised} == {NOT_RUN}
        assert all(row.figure.startswith("stock vLLM: ") for row in quantised)
    ran = [row for row in rows if row.verdict == MET]
    assert all(row.figure == "24 of 24 tokens, the same log probabilities" for row in ran[:-1])
    assert all(row.details["cache"]["demand_loads"] > 8 for row in ran)
    assert 0 < rows[3].details["distance"] < rows[3].details["noise"] < 0.2


@pytest.mark.engine
def test_tokens_of_engines_with_a_wrong_slot_map(tmp_path, monkeypatch):
    """Planted in the plugin's engines: both rows are missed."""
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plan = replace(ENGINES_OF_TESTS, contenders=[one for one in ENGINES_OF_TESTS.contenders if one.kind == "bf16"])
    rows = list(tokens.check_tokens(CPU, 1, time.monotonic() + 300, plan))
    assert [row.verdict for row in rows] == [MISSED] * 2, [row.figure for row in rows]
    assert failed(rows[:1]) and failed(rows[1:])


@pytest.mark.engine
def test_engines_on_random_weights():
    """The processes of the check, on the CPU."""
    from vllm_adapmoe.integration.measure import gpu_check

    assert gpu_check.MARK == MARK
    shape = Shape("Qwen3-MoE", 2, 8, 2, 128, 64)
    ends = time.monotonic() + 300
    (row,) = engines.check_engines(shape, ends, rounds=2, tokens=5, fractions=(), vocabulary=512)
    assert row.verdict in (MET, MISSED), row.figure
    assert row.details["ratio"]["runs"] == 2


@pytest.mark.engine
def test_engines_offload_the_same_bytes():
    from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig

    from vllm_adapmoe.integration.measure.gpu_check import engine_arguments

    uva, prefetch = (engine_arguments(kind, 0.25, 8 << 30) for kind in ("uva", "prefetch"))
    assert uva[0] is None and OffloadConfig(uva=UVAOffloadConfig(**uva[1])).uva.cpu_offload_gb == 6
    assert prefetch[0] is None
    chosen = OffloadConfig(prefetch=PrefetchOffloadConfig(**prefetch[1])).prefetch
    assert (chosen.offload_num_in_group, chosen.offload_group_size) == (3, 4)
    assert engine_arguments("adapmoe", 0.25, 8 << 30) == ({"cache_fraction": 0.25, "store": "host"}, {})
