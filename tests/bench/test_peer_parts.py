"""The parts of `python -m benchmarks peers` that need no engine."""

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from benchmarks import memory_cgroup, peer_packages, peer_process
from benchmarks.peer_floor import belady_decode_bytes, sequential_bandwidth
from benchmarks.peer_worker import Task
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.simulate.trace import Step, TraceInfo, TraceWriter
from vllm_adapmoe.units import parse_bytes

POPEN = subprocess.Popen


def test_sizes_have_a_unit():
    assert parse_bytes("--memory", "2.5GiB") == 5 << 29
    assert parse_bytes("--memory", "300 MiB") == 300 << 20
    assert parse_bytes("--memory", "1GB") == 10**9
    for wrong in ("3", "1.2.3GiB", "GiB", "4KB", ""):
        with pytest.raises(OneLineError, match="--memory"):
            parse_bytes("--memory", wrong)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(peer_packages.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(AdapMoEError, match=r"no-such-package is not installed; pip install vllm-adapmoe\[peers\]"):
        peer_packages.need("no_such_module")
    assert peer_packages.missing("json", "no_such_module") is not None
    assert peer_packages.missing("json") is None


def worker(monkeypatch, tmp_path, code, timeout=30, memory=None):
    """What `run_worker` says of a process that runs `code` instead of a contender."""
    monkeypatch.setattr(
        peer_process.subprocess, "Popen", lambda command, **others: POPEN([sys.executable, "-c", code], **others)
    )
    return peer_process.run_worker(Task("none", str(tmp_path), str(tmp_path), [[1, 2]], 1), memory, timeout)


def test_the_last_line_is_the_result(monkeypatch, tmp_path):
    code = "import time; x = bytes([1]) * (50 << 20); time.sleep(.5); print('a'); print('{\"b\": 1}')"
    result = worker(monkeypatch, tmp_path, code)
    assert result["b"] == 1 and result["peak_bytes"] is None
    assert result["held_bytes"] > 50 << 20


def test_an_end_before_the_result_is_a_failure(monkeypatch, tmp_path):
    result = worker(monkeypatch, tmp_path, "raise SystemExit('no reason')")
    assert result["failure"] == "exit code 1: no reason" and result["exit_code"] == 1


@pytest.mark.skipif(memory_cgroup.why_not() is not None, reason=str(memory_cgroup.why_not()))
def test_a_worker_whose_child_is_killed_is_out_of_memory(monkeypatch, tmp_path):
    """As vLLM's worker is, whose parent then may wait for ever; the group is gone afterwards."""
    code = (
        "import subprocess, sys, time; "
        "subprocess.run([sys.executable, '-c', 'x = bytes([1]) * (200 << 20)']); time.sleep(60)"
    )
    result = worker(monkeypatch, tmp_path, code, memory=64 << 20)
    assert result["failure"] == "out of memory"
    assert 32 << 20 < result["peak_bytes"] <= 64 << 20
    result = worker(monkeypatch, tmp_path, "print('{}')", memory=64 << 20)
    assert "failure" not in result


def test_a_worker_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path):
    code = (
        "import subprocess, time; "
        f"child = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); "
        "time.sleep(60)"
    )
    result = worker(monkeypatch, tmp_path, code, timeout=1)
    assert result["failure"] == "not done after 1 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")


def step(position, ids):
    rows = len(ids)
    return Step(
        0.0,
        ["a"] * rows,
        np.arange(position, position + rows, dtype=np.int32),
        np.array([ids]),
        np.ones((1, rows, 1)),
        {},
    )


def test_the_floor_counts_what_decoding_has_to_move(tmp_path):
    info = TraceInfo("m", [4], 1, 0, [100], [0])
    writer = TraceWriter(tmp_path / "trace", info, 1 << 20)
    for one in (
        step(0, [[0], [1], [2]]), step(3, [[2]]), step(4, [[3]]), step(5, [[2]]),
        step(0, [[0], [1]]), step(2, [[1]]), step(3, [[0]]), step(4, [[0]]),
    ):  # fmt: skip
        writer.add(one)
    writer.close()
    assert belady_decode_bytes(tmp_path / "trace", 2) == [pytest.approx(100 / 3), 0]


def test_bandwidth_is_of_whole_records(tmp_path):
    path = tmp_path / "pack"
    path.write_bytes(bytes(10 * 4096))
    assert sequential_bandwidth(path, 4 * 4096) > 0
