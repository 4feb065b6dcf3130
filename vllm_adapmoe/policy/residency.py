"""Residency of a pool: the state machine of which expert is in, or loading into, which slot. No weights, no threads."""

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.compiled import compiled
from vllm_adapmoe.policy.events import Entry, Load, Request, State
from vllm_adapmoe.policy.eviction import EvictionPolicy
from vllm_adapmoe.policy.victims import Victims


class Residency:
    """Residency of one pool: assigns slots, pins, evicts and stages.

    Of the `num_slots` slots, `staging` are for prefetches, which evict no resident expert unless their use is
    near-certain. When a staged expert is requested, it becomes resident in its slot, and the slot of the expert evicted
    for it becomes free.

    Args:
        num_slots: slots of the pool.
        staging: slots that only prefetches use, fewer than `num_slots`.
        policy: eviction policy.
        floors: minimum slots per layer protected from eviction while another layer exceeds its floor; None: no floors.
    """

    def __init__(
        self, num_slots: int, staging: int, policy: EvictionPolicy, floors: Sequence[int] | None = None
    ) -> None:
        assert 0 <= staging < num_slots
        self.num_slots = num_slots
        self.staging = staging
        self.capacity = num_slots - staging
        """Maximum number of experts resident together, and so of one request."""
        self.policy = policy
        layers, experts = policy.wait.shape
        self.slots = np.full((layers, experts), -1, dtype=np.int32)
        """Int32 `[layers, experts]`: slot of each resident expert, -1 for others."""
        self.pins = np.zeros((layers, experts), dtype=np.int32)
        """Int32 `[layers, experts]`: requests that have not released the expert yet."""
        self.entries: dict[ExpertKey, Entry] = {}
        """Experts queued, loading or staged."""
        self.free = list(range(num_slots - 1, -1, -1))
        self.max_speculating = num_slots - experts
        """Maximum slots of near-certain prefetches, so that a whole layer always fits."""
        self.evictable = np.zeros((layers, experts), dtype=bool)
        """Bool `[layers, experts]`: resident and not pinned."""
        self._victims = Victims(policy, self.evictable)
        self._others = ~np.eye(layers, dtype=bool)
        """Bool `[layers, layers]`: for each layer, all layers but it."""
        self.count = [0] * layers
        """Resident experts of each layer, demand loads in flight included."""
        self.residents = 0
        self.speculative: dict[ExpertKey, Entry] = {}
        """Entries queued, loading or staged that no layer has requested yet."""
        self._stale: set[ExpertKey] = set()
        """Those of them that are staged and were mispredicted."""
        self.speculating = 0
        """Slots held by those entries."""
        self.set_floors(floors)

    def set_floors(self, floors: Sequence[int] | None) -> None:
        """Sets the floors of the layers; evicts nothing by itself."""
        self.floors = None if floors is None else np.asarray(floors)

    def holds(self, key: ExpertKey) -> bool:
        """Returns whether an expert is resident."""
        return bool(self.slots[key] >= 0)

    def wait_of(self, key: ExpertKey) -> float:
        """Returns the eviction policy's wait of one expert: the longer, the sooner it is evicted."""
        return self._victims.wait_of(key)

    def state(self, key: ExpertKey) -> State:
        """Returns the state of an expert; a cancelled load counts as absent, as it will be dropped."""
        entry = self.entries.get(key)
        if entry is None:
            return State.RESIDENT if self.holds(key) else State.ABSENT
        return State.ABSENT if entry.cancelled else entry.state

    def request(
        self,
        layer: int,
        experts: Sequence[int] | np.ndarray,
        event_experts: Iterable[int] = (),
        expected: np.ndarray | None = None,
    ) -> Request:
        """Handles one event: assigns slots to distinct `experts`, at most `capacity`, and pins them until `release`.

        None of them is evicted for another, so all are resident when the layer's kernel runs. A loading expert
        counts as resident from here on.

        Args:
            layer: MoE layer index.
            experts: experts of this event, or of this wave of it.
            event_experts: experts of all waves of the event; prefetches of them are not mispredicted.
            expected: as in `EvictionPolicy.record`.
        """
        assert len(experts) <= self.capacity, f"{len(experts)} experts requested of {self.capacity} slots"
        requested = np.asarray(experts, dtype=np.int64)
        self._victims.record(layer, requested, expected)
        request = Request()
        if self.speculative:
            self._withdraw(layer, {*experts, *event_experts}, request)
        absent = np.empty(len(requested), np.int64)
        misses = _pin(requested, self.slots[layer], self.pins[layer], self.evictable[layer], absent)
        request.hits = len(requested) - misses
        if not misses:
            return request
        missing: list[tuple[ExpertKey, Entry | None]] = []
        for expert in absent[:misses].tolist():
            key = layer, expert
            entry = self.entries.get(key)
            if entry is None or entry.state is State.QUEUED:
                if entry is not None:  # a demand load replaces it
                    self.unqueue(key)
                missing.append((key, None))
            elif entry.speculative:
                missing.append((key, entry))
            else:
                request.awaited.append(Load(key, entry.slot))
        for key, entry in missing:
            evicted = self._make_room(layer, slot=entry is None)
            if entry is None:
                entry = self.entries[key] = Entry(State.LOADING, self.free.pop())
                request.loads.append(Load(key, entry.slot, evicted))
            else:
                self._claim(key, entry)
                if entry.state is State.STAGED:
                    self._settle(key, entry)
                    request.promoted.append(Load(key, entry.slot, evicted))
                else:
                    request.awaited.append(Load(key, entry.slot, evicted))
            self.residents += 1
            self.count[layer] += 1
        return request

    def is_whole(self, layer: int, experts: int) -> bool:
        """Returns whether all `experts` of `layer` are resident and none is pinned."""
        return bool(self.evictable[layer, :experts].all())

    def release(self, layer: int, experts: Sequence[int] | np.ndarray) -> None:
        """Unpins these experts, as the kernel that reads them has been launched."""
        _unpin(np.asarray(experts, dtype=np.int64), self.slots[layer], self.pins[layer], self.evictable[layer])
        self._victims.changed[layer] = True

    def request_prefetch(self, key: ExpertKey, near_certain: bool = False) -> bool:
        """Queues a prefetch; returns whether the expert was absent. Otherwise keeps what is loaded or in flight.

        Args:
            key: the expert.
            near_certain: whether its use is near-certain, so that it may evict a resident expert.
        """
        if self.holds(key):
            return False
        entry = self.entries.get(key)
        if entry is None:
            self.entries[key] = self.speculative[key] = Entry(State.QUEUED, speculative=True, near_certain=near_certain)
            return True
        self._stale.discard(key)
        entry.cancelled = False
        entry.near_certain |= near_certain
        return False

    def start_load(self, key: ExpertKey) -> Load | None:
        """Assigns a slot to a queued expert; returns None, and it is absent, if it gets none or is not queued."""
        entry = self.entries.get(key)
        if entry is None or entry.state is not State.QUEUED:
            return None
        evicted = None
        if self.speculating >= self.staging:
            evicted = self._stale_prefetch()
            if evicted is None:
                may_displace = entry.near_certain and self.speculating < self.max_speculating
                if may_displace and not self.free:
                    evicted = self._victim(key[0], spared=True)
                if not may_displace or (evicted is None and not self.free):
                    self.unqueue(key)
                    return None
            if evicted is not None:
                self._drop(evicted)
        self.speculating += 1
        entry.state, entry.slot = State.LOADING, self.free.pop()
        return Load(key, entry.slot, evicted)

    def complete_load(self, key: ExpertKey) -> State:
        """Records that a load has completed; returns the expert's new state."""
        entry = self.entries[key]
        assert entry.state is State.LOADING
        if entry.cancelled:
            self._drop(key)
            return State.ABSENT
        if entry.speculative:
            entry.state = State.STAGED
        else:
            self._settle(key, entry)
        return entry.state

    def _settle(self, key: ExpertKey, entry: Entry) -> None:
        """Makes an expert resident in the slot that holds its weights."""
        del self.entries[key]
        entry.state = State.RESIDENT
        self.slots[key] = entry.slot
        self.evictable[key] = self.pins[key] == 0
        self._victims.changed[key[0]] = True

    def request_ahead(self, layer: int, votes: np.ndarray, max_loads: int) -> list[Load]:
        """Makes experts of the layer after the last event's resident as a GPU prefetches them, over less valuable ones.

        Those with most votes first, of equal ones the first. An expert with votes is not evicted.

        Args:
            layer: MoE layer index.
            votes: tokens that are predicted to use each expert, integer `[experts]`.
            max_loads: maximum number of loads.
        """
        limit = self.caught_up().ahead_limit
        kept = np.flatnonzero((votes > 0) & self.evictable[layer, : len(votes)])
        self.evictable[layer, kept] = False
        self._victims.changed[layer] = True
        wanted = np.where(self.slots[layer, : len(votes)] < 0, votes, 0)
        loads: list[Load] = []
        while len(loads) < max_loads and wanted.any():
            key = layer, int(wanted.argmax())
            evicted = None
            if not self.free:
                evicted = self._victim(layer)
                if evicted is None or self.wait_of(evicted) <= limit:
                    break
                self._drop(evicted)
            self.slots[key] = self.free.pop()
            self.residents += 1
            self.count[layer] += 1
            wanted[key[1]] = 0
            loads.append(Load(key, int(self.slots[key]), evicted))
        self.evictable[layer, kept] = True
        self.evictable[layer, [load.key[1] for load in loads]] = True
        self._victims.changed[layer] = True
        return loads

    def record_use(self, layer: int, experts: np.ndarray) -> None:
        """Records one event whose distinct `experts`, int64, were resident without being requested. Pins nothing."""
        self._victims.record(layer, experts, None)

    def show_residents(self, count: np.ndarray) -> None:
        """Sets the numbers that are reported while a GPU decides: resident experts of each layer."""
        self.count = count.tolist()
        self.residents = sum(self.count)

    def settle(self) -> list[ExpertKey]:
        """Ends speculation, between two steps: staged experts become resident, in all slots of the pool; returns them.

        No load may be in flight. Until `adopt`, no slots are set aside for prefetches.
        """
        staged = []
        for key, entry in list(self.speculative.items()):
            if entry.state is not State.STAGED:
                self.unqueue(key)
                continue
            self._claim(key, entry)
            self._settle(key, entry)
            self.residents += 1
            self.count[key[0]] += 1
            staged.append(key)
        self.capacity = self.num_slots
        return staged

    def caught_up(self) -> EvictionPolicy:
        """Returns the eviction policy, after all events so far."""
        return self._victims.caught_up()

    def best_victims(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each layer's best victim, int32 `[layers]`, -1: none, and its wait without the layer's distance."""
        wait = np.where(self.evictable, self.caught_up().wait, np.iinfo(np.int64).min)
        best = wait.argmax(1)
        found = self.evictable.any(1)
        return np.where(found, best, -1).astype(np.int32), np.where(found, wait.max(1), 0)

    def adopt(self, slots: np.ndarray, free: Sequence[int]) -> list[ExpertKey]:
        """Takes over what a GPU has decided since `settle`, after the policy has; evicts experts beyond `capacity`.

        Args:
            slots: slot of each expert, int32 `[layers, experts]`, -1: not resident.
            free: free slots, of which the last is taken first.

        Returns:
            The evicted experts.
        """
        assert not self.entries and not self.pins.any()
        self.capacity = self.num_slots - self.staging
        self.slots[:] = slots
        self.evictable[:] = self.slots >= 0
        self._victims.changed.fill(True)
        self.count = self.evictable.sum(1).tolist()
        self.residents = sum(self.count)
        self.free = list(free)
        evicted = []
        while self.residents > self.capacity:
            key = self._victims.find()
            assert key is not None
            self._drop(key)
            evicted.append(key)
        return evicted

    def is_cancelled(self, key: ExpertKey) -> bool:
        """Returns whether a load in flight is not needed any more."""
        entry = self.entries.get(key)
        return entry is None or entry.cancelled

    def fail_load(self, key: ExpertKey) -> None:
        """Frees the slot of a load that has failed or was cancelled."""
        assert self.entries[key].state is State.LOADING
        self._drop(key)

    def _claim(self, key: ExpertKey, entry: Entry) -> None:
        """Turns a prefetch that holds a slot into a requested expert."""
        self.speculating -= 1
        del self.speculative[key]
        entry.speculative = entry.cancelled = False
        self._stale.discard(key)

    def _withdraw(self, layer: int, selected: set[int], request: Request) -> None:
        """Withdraws mispredicted prefetches: those of this layer for experts that its router did not select."""
        for key, entry in list(self.speculative.items()):
            if key[0] != layer or key[1] in selected or entry.cancelled:
                continue
            if entry.state is State.STAGED:
                self._stale.add(key)
                continue
            request.cancelled.append(key)
            if entry.state is State.QUEUED:
                self.unqueue(key)
            else:
                entry.cancelled = True

    def unqueue(self, key: ExpertKey) -> None:
        """Withdraws a queued load."""
        del self.entries[key], self.speculative[key]

    def _make_room(self, layer: int, slot: bool) -> ExpertKey | None:
        """Makes room for one more resident expert, with a free slot if `slot`; returns the victim, if any."""
        may_grow = self.residents < self.capacity
        if may_grow and (self.free or not slot):
            return None
        # No slot is free, so prefetches hold more than their staging slots: evict a mispredicted one first.
        key = (self._stale_prefetch() if may_grow else None) or self._victim(layer)
        if key is None:
            raise LookupError("every resident expert is pinned, so none can be evicted")
        self._drop(key)
        return key

    def _victim(self, layer: int, spared: bool = False) -> ExpertKey | None:
        """Returns the victim for an expert of `layer`; None: no expert is evictable.

        Args:
            layer: MoE layer index.
            spared: whether experts of that layer are evicted only if there are no others.
        """
        preferred: list[np.ndarray] = []
        if self.floors is not None:
            above = np.array(self.count) > self.floors
            above[layer] = self.count[layer] >= self.floors[layer]
            preferred.append(above)
        if spared:
            others = self._others[layer]
            preferred = [*(above & others for above in preferred), others, *preferred]
        return self._victims.find(preferred)

    def _stale_prefetch(self) -> ExpertKey | None:
        if not self._stale:
            return None
        return min(self._stale, key=lambda key: (-self.wait_of(key), key))

    def _drop(self, key: ExpertKey) -> None:
        """Frees the slot of an expert that is resident, staged or loading."""
        layer, _ = key
        entry = self.entries.pop(key, None)
        if entry is None:
            self.free.append(int(self.slots[key]))
            self.slots[key] = -1
        else:
            self.free.append(entry.slot)
        self.pins[key] = 0
        self.evictable[key] = False
        self._victims.changed[layer] = True
        if entry is not None and entry.speculative:
            self._stale.discard(key)
            del self.speculative[key]
            self.speculating -= 1
        else:
            self.residents -= 1
            self.count[layer] -= 1


@compiled
def _pin(experts: np.ndarray, slots: np.ndarray, pins: np.ndarray, evictable: np.ndarray, absent: np.ndarray) -> int:
    """Pins experts of one layer, whose rows are given; writes those not resident to `absent`, and returns how many."""
    count = 0
    for expert in experts:
        pins[expert] += 1
        evictable[expert] = False
        if slots[expert] < 0:
            absent[count] = expert
            count += 1
    return count


@compiled
def _unpin(experts: np.ndarray, slots: np.ndarray, pins: np.ndarray, evictable: np.ndarray) -> None:
    """Unpins experts of one layer, whose rows are given; an expert whose load failed has no pins left."""
    for expert in experts:
        if pins[expert] > 0:
            pins[expert] -= 1
        evictable[expert] = pins[expert] == 0 and slots[expert] >= 0
