"""Host memory beside a container's limit: fake trees of cgroup v1 and v2, and a real group."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import memory_cgroup
from vllm_adapmoe.store.host_memory import host_memory, memory_limit

GiB = 1 << 30
UNLIMITED = 9223372036854771712
"""What v1 shows where nothing is set: the most pages that a 64-bit counter holds (`PAGE_COUNTER_MAX`)."""


def machine(root: Path, lines: str, available: int = 100 * GiB, total: int = 128 * GiB) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {total // 1024} kB\nMemFree:        1024 kB\nMemAvailable:   {available // 1024} kB\n"
        "HugePages_Total:       0\n"
    )
    (root / "proc/self/cgroup").write_text(lines)
    return root


def group(folder: Path, limit: str | int, used: int, cached: int = 0, v1: bool = False) -> None:
    """A group as the kernel shows it; of the v1 counters, those of the group alone are wrong on purpose."""
    folder.mkdir(parents=True, exist_ok=True)
    total = "total_" if v1 else ""
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    alone = "inactive_file 1\nactive_file 1\n" if v1 else ""
    (folder / "memory.stat").write_text(
        f"anon {used - cached}\n{alone}{total}inactive_file {cached // 2}\n{total}active_file {cached - cached // 2}\n"
    )


def test_without_a_group_it_is_the_machine(tmp_path):
    root = machine(tmp_path, "0::/\n")
    assert host_memory(root).available == 100 * GiB and host_memory(root).limited_by == "this machine"
    assert memory_limit(root) is None


def test_v2_takes_the_least_of_all_groups_above(tmp_path):
    root = machine(tmp_path, "0::/pod/container\n")
    tree = root / "sys/fs/cgroup"
    group(tree / "pod", 16 * GiB, 10 * GiB, cached=2 * GiB)  # 8 are left, though the container could take 20
    group(tree / "pod/container", 24 * GiB, 4 * GiB)
    found = host_memory(root)
    assert found.available == 8 * GiB
    assert found.limited_by == f"{tree}/pod/memory.max = 16.00 GiB"
    assert memory_limit(root) == 16 * GiB


def test_v2_heeds_the_limit_at_which_processes_are_slowed_down(tmp_path):
    root = machine(tmp_path, "0::/pod\n")
    pod = root / "sys/fs/cgroup/pod"
    group(pod, 16 * GiB, 10 * GiB, cached=2 * GiB)
    (pod / "memory.high").write_text("max\n")
    assert host_memory(root).available == 8 * GiB
    (pod / "memory.high").write_text(f"{12 * GiB}\n")
    assert host_memory(root).available == 4 * GiB
    assert host_memory(root).limited_by == f"{pod}/memory.high = 12.00 GiB"


def test_v2_inside_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    root = machine(tmp_path, "0::/\n")
    group(root / "sys/fs/cgroup", 32 * GiB, 30 * GiB, cached=25 * GiB)
    assert host_memory(root).available == 27 * GiB  # page cache is given back


def test_v2_without_a_limit_in_the_lowest_group(tmp_path):
    root = machine(tmp_path, "0::/slice/unit\n")
    group(root / "sys/fs/cgroup/slice/unit", "max", 5 * GiB)
    group(root / "sys/fs/cgroup/slice", 6 * GiB, 5 * GiB)
    assert host_memory(root).available == GiB


def test_v1_counts_the_memory_controller_with_the_groups_below(tmp_path):
    root = machine(tmp_path, "5:memory,hugetlb:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    tree = root / "sys/fs/cgroup/memory"
    group(tree, UNLIMITED, 60 * GiB, v1=True)
    group(tree / "docker/abc", 12 * GiB, 9 * GiB, cached=3 * GiB, v1=True)
    found = host_memory(root)
    assert found.available == 6 * GiB
    assert found.limited_by == f"{tree}/docker/abc/memory.limit_in_bytes = 12.00 GiB"
    assert memory_limit(root) == 12 * GiB


@pytest.mark.parametrize("path", ["/docker/abc", "/../../docker/abc", "/../.."])
def test_v1_in_a_container_whose_path_is_the_hosts(tmp_path, path):
    root = machine(tmp_path, f"5:memory:{path}\n")
    group(root / "sys/fs/cgroup/memory", 4 * GiB, GiB, v1=True)
    assert host_memory(root).available == 3 * GiB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    root = machine(tmp_path, "0::/a\n")
    group(root / "sys/fs/cgroup/a", GiB, 2 * GiB)
    assert host_memory(root).available == 0


def test_this_machine():
    assert 0 < host_memory().available <= psutil.virtual_memory().total


@pytest.mark.skipif(memory_cgroup.why_not() is not None, reason=str(memory_cgroup.why_not()))
def test_a_real_group_is_found():
    """All three who ask see it: the loader's check, the doctor and `gpu_check`."""
    script = """
from benchmarks.gpu_check.device import Device
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.doctor.machine import memory_limit
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape
from vllm_adapmoe.integration.loading.host_room import check_host_room
MiB = 1 << 20
print(memory_limit(), Device('cpu').free_bytes())
check_host_room([ExpertShape(64, MiB, 2)], 8 * MiB, [4], DeviceMemory(0, other_weights=MiB), 2)
for shapes, layer, slots, others, ranks in (
    ([ExpertShape(2048, MiB, 2)], 64 * MiB, [64], None, 1),
    # Everything but what is needed for a while, or beside the experts, would fit.
    ([ExpertShape(1024, MiB, 2)], 256 * MiB, [64], None, 1),
    ([ExpertShape(512, MiB, 2)], 32 * MiB, [256], DeviceMemory(0, other_weights=512 * MiB, kv_cache=256 * MiB), 1),
    ([ExpertShape(512, MiB, 2)], 32 * MiB, [64], None, 4),
):
    try:
        check_host_room(shapes, layer, slots, others, ranks)
    except AdapMoEError as error:
        print(error)
    else:
        print("fits")
"""
    with memory_cgroup.limited_memory(3 << 29) as limited:
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            preexec_fn=lambda: limited.procs.write_text(str(os.getpid())),
        )
    assert run.returncode == 0, run.stderr[-2000:]
    numbers, *said = run.stdout.splitlines()[-5:]
    limit, available = map(int, numbers.split())
    assert limit == 3 << 29 and 0 < available < 3 << 29
    needs = (
        "2281701376 bytes (2.12 GiB) of host memory, 2.00 for experts + 0.12 for 2 layers while they load; ",
        "1610612736 bytes (1.50 GiB) of host memory, 1.00 for experts + 0.50 for 2 layers while they load; ",
        "1677721600 bytes (1.56 GiB) of host memory, 0.50 for experts + 0.06 for 2 layers while they load + 0.25 for "
        "slots + 0.75 for other weights, KV cache and activations; ",
        "2415919104 bytes (2.25 GiB) of host memory, 0.50 for experts + 0.06 for 2 layers while they load on each of 4 "
        "ranks; ",
    )
    for one, needed in zip(said, needs, strict=True):
        assert one.startswith(f"store=host needs {needed}")
        assert "1.50 GiB" in one and limited.folder.name in one and one.endswith("; use store=file")
