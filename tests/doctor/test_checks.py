"""Checks of `adapmoe doctor` against what the system says itself, and failures that are real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory_cgroup
from vllm_adapmoe.doctor.disk import check_disk
from vllm_adapmoe.doctor.finding import Finding, serves
from vllm_adapmoe.doctor.machine import check_machine
from vllm_adapmoe.store.host_memory import memory_limit


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_a_folder_to_pack_in(tmp_path):
    findings = list(check_disk(tmp_path / "not" / "there", needed=True))
    assert serves(findings) and "to be created in" in findings[0].text
    assert "GB/s" in findings[-1].text and findings[-1].works
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_direct_io_is_what_the_kernel_gives():
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm here")
    path = folder / f"adapmoe-doctor-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        direct = True
    except OSError:
        direct = False
    finally:
        path.unlink(missing_ok=True)
    findings = list(check_disk(folder, needed=True))
    assert any(one.text == "direct I/O works" for one in findings) is direct
    assert any("page cache" in one.text for one in findings) is not direct


@pytest.mark.parametrize("folder", ["/proc/adapmoe", "/sys/kernel/adapmoe", "file"])
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    store_dir = tmp_path / folder  # an absolute one replaces it
    (finding,) = check_disk(store_dir, needed=False)
    assert finding.level == "problem" and "cannot be written (" in finding.text and "--store-dir" in finding.remedy


def test_the_default_folder_is_no_matter_where_experts_are_in_host_memory(monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/proc/adapmoe")
    assert levels(list(check_disk(None, needed=True))) == ["problem"]
    assert levels(list(check_disk(None, needed=False))) == ["note"]


def test_this_machine_serves():
    findings = list(check_machine("cpu"))
    assert serves(findings)
    assert any(f"{len(os.sched_getaffinity(0))} cores" in one.text for one in findings)


def test_few_open_files():
    code = (
        "from vllm_adapmoe.doctor.machine import check_machine\n"
        "print([one.remedy for one in check_machine('cpu') if one.level == 'note'])"
    )
    run = subprocess.run(
        ["prlimit", "--nofile=512:512", sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "ulimit -n 65536" in run.stdout


def test_the_limit_of_a_control_group():
    if memory_cgroup.why_not() is not None:
        pytest.skip(str(memory_cgroup.why_not()))
    outside = memory_limit()
    code = (
        "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('0')\n"
        "from vllm_adapmoe.store.host_memory import memory_limit; print(memory_limit())"
    )
    with memory_cgroup.limited_memory(2 << 30) as group:
        run = subprocess.run([sys.executable, "-c", code, str(group.procs)], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2 << 30
    assert memory_limit() == outside
