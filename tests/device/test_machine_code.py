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


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request) -> tuple[int, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, json.loads(done.stdout)


def test_fits(compiled):
    """To machine code, with the assembler that Triton brings, at the largest sizes that are promised."""
    capability, kernels = compiled
    assert [one["kernel"] for one in kernels] == ["_gate_batch", *["_claim"] * 3] * 3 + ["_fetch"]
    for one in kernels:
        assert one["machine_code"] and one["shared"] <= SHARED_BYTES[capability], (one["kernel"], one["shared"])
        assert "st.local" not in one["ptx"] and "ld.local" not in one["ptx"], "registers suffice"


def test_records_are_copied_16_bytes_at_a_time(compiled):
    """Several loads in flight before the first store; single bytes only for pieces of odd sizes."""
    ptx = compiled[1][-1]["ptx"]
    loads, stores = (ptx.count(f"{what}.global.v4.b32") for what in ("ld", "st"))
    assert loads == stores >= 4
    assert not re.findall(r"ld\.global\S*\.b16", ptx)
    first_store = ptx.index("st.global.v4.b32")
    assert ptx[:first_store].count("ld.global.v4.b32") >= 4, "loads run ahead"


def test_offsets_of_slots_are_of_64_bits(compiled):
    """A pool may be larger than 2 GiB, and a slot's number times its bytes is taken in 64 bits."""
    ptx = compiled[1][-1]["ptx"]
    assert re.findall(r"(?:mul\.lo|mad\.lo)\.s64", ptx)
    assert not re.findall(r"(?:mul\.lo|mad\.lo)\.[su]32", ptx)


def test_the_decision_is_integers(compiled):
    """No floating point, which a compiler may round in another way than the host's; only a head's chances are combined
    in it, by operations that every machine rounds alike: no product is fused with a sum."""
    claims = [one["ptx"] for one in compiled[1] if one["kernel"] == "_claim"]
    operations = [set(re.findall(r"\b(?:fma|add|sub|mul|div)\.\S*f(?:16|32|64)", ptx)) for ptx in claims]
    assert operations[:6] == [set()] * 6 and operations[6:] == [{"add.rn.f64", "sub.rn.f64", "mul.rn.f64"}] * 3
    assert all("bar.sync" in ptx for ptx in claims), "what one thread has stored, others read"
