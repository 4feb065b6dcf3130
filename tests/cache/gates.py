"""Gates where threads of an expert cache wait for a test: before each tile, before a job begins, when it has moved."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.store.test_stores import random_tensor
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.events import waves
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.direct_io import read_full
from vllm_adapmoe.store.file import FileStore
from vllm_adapmoe.store.record import ALIGNMENT

EXPERTS = 4
KERNEL: ExpertKey = (-1, -1)
"""Where the thread that asks waits while its kernel runs."""


def records(number: int) -> dict[str, torch.Tensor]:
    """Experts of three tiles; those of the last layer fill no whole blocks, and are read aside."""
    odd = 4 if number == 2 else 0
    generator = torch.Generator().manual_seed(number)
    shapes = {"w13": (EXPERTS, 2 * ALIGNMENT - odd), "w2": (EXPERTS, ALIGNMENT)}
    return {name: random_tensor(shape, torch.uint8, generator) for name, shape in shapes.items()}


LAYERS = [records(number) for number in range(3)]


FAULTS = {
    "go": [],
    "retried": ["error"],
    "retried short": ["short"],
    "broken": ["short", "error"],
    "broken short": ["error", "short"],
}
"""What a read and its retry come to."""


class Gates:
    """Where threads wait for the test. A key names a transfer: never two threads wait at one."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[ExpertKey, threading.Thread] = {}
        self.passes: dict[ExpertKey, deque[str]] = {}
        self.open = False
        self.faults: dict[threading.Thread, deque[str]] = {}
        """What the next reads of a thread come to."""

    def wait(self, key: ExpertKey) -> str:
        with self.changed:
            assert key not in self.waiting
            self.waiting[key] = threading.current_thread()
            self.changed.wait_for(lambda: self.open or self.passes.get(key))
            del self.waiting[key]
            return self.passes[key].popleft() if self.passes.get(key) else "go"

    def let_pass(self, key: ExpertKey, how: str = "go") -> None:
        with self.changed:
            self.passes.setdefault(key, deque()).append(how)
            self.changed.notify_all()

    def set_open(self, value: bool) -> None:
        with self.changed:
            self.open = value
            self.passes.clear()
            self.changed.notify_all()

    def read(self, fd: int, buffers: Sequence[torch.Tensor], offset: int) -> int:
        """`read_full`, or what a bad disk makes of it."""
        faults = self.faults.get(threading.current_thread())
        fault = faults.popleft() if faults else "go"
        if fault == "error":
            raise OSError(5, "Input/output error")
        if fault == "short":
            return read_full(fd, [buffer[: len(buffer) // 2] for buffer in buffers[:1]], offset)
        return read_full(fd, buffers, offset)


class GatedStore:
    """A packed file whose every tile waits at a gate, and counts what it hands out."""

    def __init__(self, store: FileStore, gates: Gates) -> None:
        self.store, self.gates = store, gates
        self.handed_out = 0
        self.broken: set[ExpertKey] = set()
        """Whose last read failed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read_tiles(self, key: ExpertKey, into: Any, tile_bytes: int) -> Iterator[int]:
        tiles = self.store.read_tiles(key, into, ALIGNMENT)
        self.broken.discard(key)
        while True:
            how = self.gates.wait(key)
            self.gates.faults[threading.current_thread()] = deque(FAULTS[how])
            try:
                nbytes = next(tiles, None)
            except StoreError:
                if how.startswith("broken"):  # otherwise it should have been tried again
                    self.broken.add(key)
                raise
            if nbytes is None:
                return
            with self.gates.changed:
                self.handed_out += nbytes
            yield nbytes


def holds(cache: ExpertCacheManager, slot: int, key: ExpertKey) -> bool:
    """Whether a slot's bytes are those of an expert."""
    tensors = cache.pool(key[0]).tensors
    return all(torch.equal(tensor[slot], LAYERS[key[0]][name][key[1]]) for name, tensor in tensors.items())


class Event(threading.Thread):
    """One event of a layer, in the thread that asks: acquires, runs its kernel and releases, wave by wave."""

    def __init__(
        self,
        cache: ExpertCacheManager,
        gates: Gates,
        layer: int,
        experts: list[int],
        meanwhile: Callable[[], None] | None,
    ) -> None:
        super().__init__(name="asks", daemon=True)
        self.cache, self.gates, self.layer, self.meanwhile = cache, gates, layer, meanwhile
        self.groups = waves(experts, cache.capacity(layer))
        self.event_experts = experts if len(self.groups) > 1 else ()
        self.group: Sequence[int] = ()
        """Asked for, or held."""
        self.broken: set[int] = set()
        """Experts whose reads failed while it waited for them."""
        self.error: BaseException | None = None

    def run(self) -> None:
        cache, gates = self.cache, self.gates
        try:
            for group in self.groups:
                self.group = group
                meanwhile = self.meanwhile if group is self.groups[0] else None
                acquisition = cache.begin(self.layer, self.group, self.event_experts)
                if meanwhile is not None:
                    meanwhile()
                slots = cache.wait(acquisition).tolist()
                self.check(slots)
                gates.wait(KERNEL)
                self.check(slots)
                cache.release(self.layer, self.group)
        except BaseException as error:
            self.error = error

    def check(self, slots: list[int]) -> None:
        assert len({slots[expert] for expert in self.group}) == len(self.group), "two experts in one slot"
        for expert in self.group:
            assert slots[expert] >= 0
            assert holds(self.cache, slots[expert], (self.layer, expert)), "the kernel would run other weights"
