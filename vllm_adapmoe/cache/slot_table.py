"""Which expert is in which slot: the bookkeeping of a pool, without the weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_adapmoe.cache.eviction import EvictionPolicy, ExpertKey


@dataclass(frozen=True)
class Load:
    """A demand load: `key` goes into `slot`, from which `evicted` has left."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None


def waves(experts: Sequence[int], num_slots: int) -> list[Sequence[int]]:
    """Splits a layer's distinct experts, ascending, into groups that fit the slots.

    A function of the routing and the slot count alone: what happens to be resident must not change an output.
    """
    return [experts[start : start + num_slots] for start in range(0, len(experts), num_slots)]


class SlotTable:
    """Residency of one pool of `num_slots` slots."""

    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of: dict[ExpertKey, int] = {}
        self.free = list(range(num_slots - 1, -1, -1))

    def request(self, keys: Sequence[ExpertKey]) -> list[Load]:
        """Makes all of `keys` resident at once: those of one layer in one step, no more than there are slots.

        None of them leaves for another of them, so a layer's experts are together when its kernel runs.
        A load counts as resident from here on; `forget` it if it fails.
        """
        missing = []
        for key in keys:
            if key in self.slot_of:
                self.policy.touch(key)
            else:
                missing.append(key)
        if not missing:
            return []
        assert len(keys) <= self.num_slots, f"{len(keys)} experts requested of {self.num_slots} slots"
        protected = set(keys)
        loads = []
        for key in missing:
            evicted = None
            if not self.free:
                evicted = self.policy.victim(protected)
                self.forget(evicted)
            slot = self.free.pop()
            self.slot_of[key] = slot
            self.policy.insert(key)
            loads.append(Load(key, slot, evicted))
        return loads

    def forget(self, key: ExpertKey) -> None:
        """Gives the slot of a resident expert back."""
        self.free.append(self.slot_of.pop(key))
        self.policy.remove(key)
