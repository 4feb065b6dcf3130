"""Offsets beyond 2**32 elements, in Triton's interpreter: a few programs on tensors that only reserve their memory.

Sizes are such that an offset of 32 bits wraps around to other values of the same tensor. Faults are planted in copies
of the kernels' source.
"""

import importlib.util
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.gpu_check import expert_kernel
from vllm_adapmoe.device import fetch
from vllm_adapmoe.device.residency import Loads
from vllm_adapmoe.store.record import RecordLayout

LONG, SHORT = 2**27 + 32, 32
"""Their product, and that of `LONG` with 32 rows, is beyond 2**32."""
ROWS = range(32, 40)
"""Pairs with an expert: their offsets, cut to 32 bits, are those of the first rows."""
PAIRS = 64
NORESERVE = 0x4000
"""Linux: pages are committed when they are touched, whatever the size."""
FIRST_SLOT = torch.zeros(1, dtype=torch.int32)
"""Map of one expert, to the first slot."""
LATE_SLOT = 2**21 + 1
"""Of 2048 elements each: its offset, cut to 32 bits, is that of the second slot."""
TILE = {"PAIRS": PAIRS, "ROWS": 16, "BLOCK_N": 32, "BLOCK_K": 128}


def reserve(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Zeros."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer(
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE), dtype=dtype
    ).view(shape)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def begin_at(monkeypatch) -> Callable[[int, int], None]:
    """Lets launches begin with these programs instead of the first."""
    begin = [0, 0, 0]
    program_id = InterpreterBuilder.create_get_program_id

    def shifted(self, axis):
        value = program_id(self, axis)
        value.data = value.data + np.int32(begin[axis])
        return value

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", shifted)
    return lambda first, second: begin.__setitem__(slice(2), [first, second])


def pairs_of_one_expert() -> torch.Tensor:
    ids = torch.full((PAIRS,), -1, dtype=torch.int32)
    ids[ROWS.start : ROWS.stop] = 0
    return ids


def gate_and_up(kernels: ModuleType, begin_at: Callable[[int, int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last rows of both halves, for tokens that are far apart."""
    hidden, inner, rows = SHORT, LONG, slice(ROWS.start, ROWS.stop)
    weight, x = reserve(2 * inner, hidden), reserve(PAIRS, LONG)[:, :hidden]
    parts = {0: weight[:32], 1: weight[inner - 32 : inner], 2: weight[inner : inner + 32], 3: weight[-32:]}
    for seed, part in parts.items():
        part.copy_(drawn(32, hidden, seed=seed) / hidden**0.5)
    x[rows], x[: len(ROWS)] = drawn(len(ROWS), hidden, seed=4), drawn(len(ROWS), hidden, seed=5)
    out = reserve(PAIRS, inner)
    begin_at(ROWS.start, inner // 32 - 1)
    kernels._gate_and_up[(1, 1)](
        x, pairs_of_one_expert(), FIRST_SLOT, weight, out, PAIRS, hidden, inner, 1, x.stride(0), 0, **TILE
    )  # fmt: skip
    gate, up = (x[rows].float() @ parts[number].float().T for number in (1, 3))
    return out[rows, -32:], torch.nn.functional.silu(gate) * up


def down(kernels: ModuleType, begin_at: Callable[[int, int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last rows of the projection."""
    hidden, inner, rows = LONG, SHORT, slice(ROWS.start, ROWS.stop)
    weight, activated = reserve(hidden, inner), drawn(PAIRS, inner, seed=6)
    for seed, part in enumerate((weight[:32], weight[-32:])):
        part.copy_(drawn(32, inner, seed=seed) / inner**0.5)
    out = reserve(PAIRS, hidden, dtype=torch.float32)
    begin_at(ROWS.start, hidden // 32 - 1)
    kernels._down[(1, 1)](
        activated, pairs_of_one_expert(), FIRST_SLOT, weight, out, PAIRS, hidden, inner, 0, **TILE
    )  # fmt: skip
    return out[rows, -32:], activated[rows].float() @ weight[-32:].float().T


def combine(kernels: ModuleType, begin_at: Callable[[int, int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a late token's row."""
    token, block = ROWS.stop, 1024
    hidden = LONG - 32
    outputs, out = reserve(PAIRS, hidden, dtype=torch.float32), reserve(PAIRS, hidden)
    outputs[token, -block:] = drawn(block, seed=7).float()
    begin_at(token, hidden // block - 1)
    ids, weights = torch.zeros(PAIRS, dtype=torch.int32), torch.full((PAIRS,), 0.5)
    kernels._combine[(1, 1)](outputs, ids, FIRST_SLOT, weights, out, hidden, 1, BLOCK=block)
    return out[token, -block:], 0.5 * outputs[token, -block:]


def late_slot(shape: tuple[int, int], run: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
    """A pool of 2048 elements a slot with other values in the late slot and the second; returns those of the late."""
    pool = reserve(LATE_SLOT + 1, *shape)
    pool[LATE_SLOT], pool[1] = drawn(*shape, seed=8), drawn(*shape, seed=9)
    run(pool, torch.tensor([LATE_SLOT], dtype=torch.int32))
    return pool[LATE_SLOT].float()


def gate_and_up_of_a_late_slot(
    kernels: ModuleType, begin_at: Callable[[int, int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = drawn(1, 32, seed=10), torch.zeros(1, 32, dtype=torch.float16)
    sizes = TILE | {"PAIRS": 1}

    def run(pool: torch.Tensor, row_of: torch.Tensor) -> None:
        ids = torch.zeros(1, dtype=torch.int32)
        kernels._gate_and_up[(1, 1)](x, ids, row_of, pool, out, 1, 32, 32, 1, 32, 2048, **sizes)

    weight = late_slot((64, 32), run)
    gate, up = (x.float() @ weight.T).chunk(2, 1)
    return out, torch.nn.functional.silu(gate) * up


def down_of_a_late_slot(kernels: ModuleType, begin_at: Callable[[int, int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    activated, out = drawn(1, 32, seed=10), torch.zeros(1, 64)
    sizes = TILE | {"PAIRS": 1}

    def run(pool: torch.Tensor, row_of: torch.Tensor) -> None:
        kernels._down[(1, 2)](activated, torch.zeros(1, dtype=torch.int32), row_of, pool, out, 1, 64, 32, 2048, **sizes)

    return out, activated.float() @ late_slot((64, 32), run).T


def fetched(kernels: ModuleType, begin_at: Callable[[int, int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """A record in a slot that begins beyond 2**32 bytes."""
    record, nbytes = drawn(2048, seed=11), 4096
    layout = RecordLayout.of({"weights": record.view(1, -1)})
    pool = SimpleNamespace(
        layout=layout, device=torch.device("cpu"), tensors={"weights": reserve(LATE_SLOT + 1, nbytes // 2)}
    )
    loads = Loads(1, pool.device)
    loads.entries[0, 0] = torch.tensor([record.data_ptr(), LATE_SLOT])
    loads.counts[0] = 1
    kernels.Fetch(pool)(loads, 0)
    return pool.tensors["weights"][LATE_SLOT], record.float()


def same(result: tuple[torch.Tensor, torch.Tensor]) -> bool:
    output, expected = result
    return bool(expected.any()) and torch.allclose(output.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("run", [gate_and_up, gate_and_up_of_a_late_slot, down, down_of_a_late_slot, combine, fetched])
def test_beyond_32_bits(run, begin_at, monkeypatch):
    monkeypatch.setattr(fetch, "PROGRAMS", 1)
    assert same(run(fetch if run is fetched else expert_kernel, begin_at))


@pytest.mark.parametrize(
    ("run", "wide"),
    [
        pytest.param(gate_and_up, "inner.to(tl.int64) * hidden", id="where the second half begins"),
        pytest.param(gate_and_up, "token[:, None].to(tl.int64) * stride_x", id="a token"),
        pytest.param(gate_and_up, "n[:, None].to(tl.int64) * hidden", id="a row of the first projection"),
        pytest.param(gate_and_up, "rows[:, None].to(tl.int64) * inner", id="an activated row"),
        pytest.param(down, "n[:, None].to(tl.int64) * inner", id="a row of the second projection"),
        pytest.param(down, "rows[:, None].to(tl.int64) * hidden", id="an output row"),
        pytest.param(gate_and_up_of_a_late_slot, "slot.to(tl.int64) * slot_stride", id="a slot, first projection"),
        pytest.param(down_of_a_late_slot, "slot.to(tl.int64) * slot_stride", id="a slot, second projection"),
        pytest.param(combine, "pair.to(tl.int64) * hidden", id="an expert's output"),
        pytest.param(combine, "token.to(tl.int64) * hidden", id="a token's output"),
    ],
)
def test_a_product_in_32_bits(run, wide, begin_at, tmp_path):
    """Planted: its result is another one."""
    source = Path(expert_kernel.__file__).read_text()
    assert wide in source
    faulty = re.sub(r"(?<!\w)" + re.escape(wide), wide.replace(".to(tl.int64)", ""), source)
    assert not same(run(imported(faulty, tmp_path), begin_at))


def test_a_slot_to_copy_to_in_32_bits(begin_at, tmp_path):
    """Planted: the record arrives in another slot. Its factors are 64 bits in memory, so the product is cut here."""
    source, wide = Path(fetch.__file__).read_text(), "slot * size"
    assert source.count(wide) == 1
    module = imported(source.replace(wide, f"({wide}).to(tl.int32)"), tmp_path)
    module.PROGRAMS = 1
    assert not same(fetched(module, begin_at))


def imported(source: str, folder: Path) -> ModuleType:
    path = folder / "faulty.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
