"""What the kernels are compiled to, for every GPU: how weights are read, and with offsets of how many bits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

CAPABILITIES = (80, 86, 89, 90, 120)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Of a block, at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""
PARAMETERS = {"_gate_and_up": {"hidden": 5, "inner": 6, "stride_x": 8}, "_down": {"hidden": 5, "inner": 6},
              "_combine": {"hidden": 4}}  # fmt: skip
"""Places of the sizes that offsets are made of."""


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request) -> tuple[int, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, json.loads(done.stdout)


def test_fits(compiled):
    """To machine code, with the assembler that Triton brings."""
    capability, kernels = compiled
    assert [one["kernel"] for one in kernels] == ["_gate_and_up", "_down", "_combine"] * 2
    for one in kernels:
        assert one["machine_code"] and one["shared"] <= SHARED_BYTES[capability], (one["kernel"], one["shared"])


def test_weights_are_read_16_bytes_at_a_time(compiled):
    """Asynchronously, into shared memory; nothing of bf16 is read value by value."""
    for one in compiled[1]:
        ptx, name = one["ptx"], one["kernel"]
        assert not re.findall(r"ld\.global\S*\.b16", ptx), f"{name} reads single values"
        if name == "_combine":  # float32 of the experts' outputs
            assert re.findall(r"ld\.global\S*\.v4\.b32", ptx)
            continue
        copies = re.findall(r"cp\.async\.c[ag]\.shared\S*\s+\[[^]]*\], \[[^]]*\], (\w+)", ptx)
        assert copies and {int(size, 16) for size in copies} == {16}, f"{name}: {copies}"
        assert one["stages"] >= 3 and len(re.findall(r"cp\.async\.wait_group\s+[1-9]", ptx)) > 0, "loads run ahead"


def test_offsets_are_of_64_bits(compiled):
    """No product of a size is taken in 32 bits."""
    for one in compiled[1]:
        for size, place in PARAMETERS[one["kernel"]].items():
            registers = re.findall(rf"ld\.param\S+\s+(%\w+), \[{one['kernel']}_param_{place}\]", one["ptx"])
            assert registers, f"{one['kernel']} does not read {size}"
            for register in registers:
                narrow = rf"(?:mul\.lo|mad\.lo|shl)\.[sub]\d*32\s[^;]*{register}\b[^;]*;"
                assert not re.findall(narrow, one["ptx"]), f"{one['kernel']}: {size} in 32 bits"
