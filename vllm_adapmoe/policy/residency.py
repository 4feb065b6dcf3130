"""Which expert is in which slot, or on its way there: the state machine of a pool, without weights and threads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.eviction import EvictionPolicy


class State(Enum):
    """Of one expert. One that is `ABSENT` has no entry."""

    ABSENT = "absent"
    QUEUED = "queued"
    """Wanted by speculation, without a slot yet."""
    LOADING = "loading"
    STAGED = "staged"
    """Loaded by speculation, not asked for yet."""
    RESIDENT = "resident"


@dataclass
class Entry:
    """An expert that is not absent."""

    state: State
    slot: int = -1
    speculative: bool = False
    sure: bool = False
    """Of speculation: as good as asked for."""
    used: bool = False
    """Queued because it was used where it was: a load that nobody waits for, and no guess."""
    cancelled: bool = False
    """A load under way that nobody wants any more; it ends at its next tile."""
    stale: bool = False
    """Staged, but its layer has come and gone without it."""
    pins: int = 0


@dataclass(frozen=True)
class Load:
    """`key` goes into `slot`, from which `evicted` has left."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None = None


@dataclass
class Request:
    """What one event of a layer came to."""

    loads: list[Load] = field(default_factory=list)
    """Demand loads to issue."""
    hits: list[ExpertKey] = field(default_factory=list)
    """Resident already."""
    promoted: list[Load] = field(default_factory=list)
    """Staged by speculation, now resident; `evicted` left for them."""
    awaited: list[Load] = field(default_factory=list)
    """Being loaded by speculation; from now on with demand's priority."""
    cancelled: list[ExpertKey] = field(default_factory=list)
    """Speculation for this layer that turned out wrong; stop it at the next tile."""


def waves(experts: Sequence[int], capacity: int) -> list[Sequence[int]]:
    """Splits a layer's distinct experts, ascending, into groups that fit the slots.

    A function of the routing and the slot count alone: what happens to be resident must not change an output.
    """
    return [experts[start : start + capacity] for start in range(0, len(experts), capacity)]


class Residency:
    """Residency of one pool.

    Of the `num_slots` slots, `staging` are for speculation: it makes no resident expert leave, unless it is sure of
    what it loads. When a staged expert is asked for, it becomes resident where it is, and the slot of the expert that
    leaves for it becomes free.

    Args:
        num_slots: slots of the pool.
        staging: slots that only speculation uses, fewer than `num_slots`.
        policy: the order of leaving.
        shares: slots that each layer is left with while others have more than theirs; None: no layer has a claim.
    """

    def __init__(
        self, num_slots: int, staging: int, policy: EvictionPolicy, shares: Sequence[int] | None = None
    ) -> None:
        assert 0 <= staging < num_slots
        self.num_slots = num_slots
        self.staging = staging
        self.policy = policy
        self.entries: dict[ExpertKey, Entry] = {}
        self.free = list(range(num_slots - 1, -1, -1))
        layers, experts = policy.scores().shape
        self.most_speculating = num_slots - experts
        """Slots that speculation may hold when it is sure: a whole layer always finds room."""
        self.evictable = np.zeros((layers, experts), dtype=bool)
        """Resident and without pins."""
        self.count = np.zeros(layers, dtype=np.int64)
        """Residents of each layer, loads on demand included."""
        self.residents = 0
        self.speculative: dict[ExpertKey, Entry] = {}
        """Queued, loading or staged for nobody yet."""
        self.speculating = 0
        """Slots that those hold."""
        self.catching_up = 0
        """Loads under way of experts that were used where they were."""
        self.most_catching_up = self.capacity - experts
        self.set_shares(shares)

    @property
    def capacity(self) -> int:
        """Experts that can be resident together: the most that one event may ask for."""
        return self.num_slots - self.staging

    def set_shares(self, shares: Sequence[int] | None) -> None:
        """New claims of the layers; nobody leaves for them at once."""
        self.shares = None if shares is None else np.asarray(shares)

    def state(self, key: ExpertKey) -> State:
        """State of an expert; a cancelled load counts as absent, for nothing will come of it."""
        entry = self.entries.get(key)
        return State.ABSENT if entry is None or entry.cancelled else entry.state

    def request(self, layer: int, experts: Sequence[int], present: Iterable[int] = ()) -> Request:
        """One event: `layer` asks for distinct `experts` at once, at most `capacity`. Pins them until `release`.

        None of them leaves for another of them, so a layer's experts are together when its kernel runs.
        A load counts as resident from here on.

        Args:
            layer: MoE layer index.
            experts: of this event, or of this wave of it.
            present: experts of all waves of the event: speculation for them is not wrong.
        """
        assert len(experts) <= self.capacity, f"{len(experts)} experts requested of {self.capacity} slots"
        self.policy.record(layer, experts)
        request = Request()
        self._withdraw(layer, {*experts, *present}, request)
        missing: list[tuple[ExpertKey, Entry | None]] = []
        for expert in experts:
            key = layer, expert
            entry = self.entries.get(key)
            if entry is not None and entry.state is State.RESIDENT:
                request.hits.append(key)
            elif entry is not None and entry.slot >= 0 and entry.speculative:
                missing.append((key, entry))
                continue  # pinned when it has become a resident
            elif entry is not None and entry.state is State.LOADING:
                request.awaited.append(Load(key, entry.slot))
            else:
                if entry is not None:  # queued: demand loads it instead
                    self._unqueue(key)
                missing.append((key, None))
                continue
            self._pin(key, entry)
        for key, entry in missing:
            evicted = self._make_room(layer, slot=entry is None)
            if entry is None:
                entry = self.entries[key] = Entry(State.LOADING, self.free.pop())
                request.loads.append(Load(key, entry.slot, evicted))
            else:
                self._claim(key, entry)
                if entry.state is State.STAGED:
                    entry.state = State.RESIDENT
                    request.promoted.append(Load(key, entry.slot, evicted))
                else:
                    request.awaited.append(Load(key, entry.slot, evicted))
            self.residents += 1
            self.count[layer] += 1
            self._pin(key, entry)
        return request

    def record_in_place(self, layer: int, experts: Sequence[int]) -> list[Load]:
        """One event that has run without waiting, with absent experts read where they were. Pins nothing.

        Returns:
            Those that speculation had staged, and are resident now.
        """
        self.policy.record(layer, experts)
        promoted = []
        for expert in experts:
            key = layer, expert
            entry = self.entries.get(key)
            if entry is None or entry.state is not State.STAGED:
                continue
            self.evictable[key] = False  # it cannot be its own victim
            evicted = self._make_room(layer, slot=False)
            self._claim(key, entry)
            entry.state = State.RESIDENT
            self.residents += 1
            self.count[layer] += 1
            self.evictable[key] = entry.pins == 0
            promoted.append(Load(key, entry.slot, evicted))
        return promoted

    def is_whole(self, layer: int, experts: int) -> bool:
        """Whether all `experts` of `layer` are resident, and none is in use."""
        return bool(self.evictable[layer, :experts].all())

    def want_used(self, key: ExpertKey) -> bool:
        """An expert was used where it was: returns whether it is queued now, for the slot of one that is wanted less.

        Whether there is such a one is seen when its load starts.
        """
        if key in self.entries:
            return False
        self.entries[key] = self.speculative[key] = Entry(State.QUEUED, speculative=True, used=True)
        return True

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """The kernel that read these experts has run."""
        for expert in experts:
            entry = self.entries.get((layer, expert))
            if entry is None:  # its load failed
                continue
            entry.pins -= 1
            self.evictable[layer, expert] = entry.pins == 0 and entry.state is State.RESIDENT

    def request_prefetch(self, key: ExpertKey, sure: bool = False) -> bool:
        """Speculation wants an expert; returns whether it has to be loaded: it was absent, and is queued now.

        Args:
            key: of the expert.
            sure: it may take the slot of a resident one.
        """
        entry = self.entries.get(key)
        if entry is None:
            self.entries[key] = self.speculative[key] = Entry(State.QUEUED, speculative=True, sure=sure)
            return True
        entry.stale = False
        entry.cancelled = False
        entry.sure |= sure
        return False

    def start(self, key: ExpertKey) -> Load | None:
        """Gives a queued expert a staging slot; None if there is none, or it is no longer queued. Then it is absent."""
        entry = self.entries.get(key)
        if entry is None or entry.state is not State.QUEUED:
            return None
        if entry.used:
            return self._start_used(key, entry)
        evicted = None
        if self.speculating >= self.staging:
            evicted = self._stale()
            if evicted is None and not (entry.sure and self._may_displace()):
                self._unqueue(key)
                return None
            if evicted is None and not self.free:
                evicted = self._victim(key[0], spared=key[0])
            if evicted is not None:
                self._drop(evicted)
        self.speculating += 1
        entry.state, entry.slot = State.LOADING, self.free.pop()
        return Load(key, entry.slot, evicted)

    def _start_used(self, key: ExpertKey, entry: Entry) -> Load | None:
        evicted = None
        held = self.speculating + self.catching_up
        if self.catching_up >= self.most_catching_up or held >= self.most_speculating:
            self._unqueue(key)
            return None
        if self.residents >= self.capacity or not self.free:
            scores = self.policy.scores()
            evicted = self._victim(key[0]) if self.evictable.any() else None
            if evicted is None or scores[evicted] >= scores[key]:
                self._unqueue(key)
                return None
            self._drop(evicted)
        del self.speculative[key]
        entry.speculative = False
        self.catching_up += 1
        self.residents += 1
        self.count[key[0]] += 1
        entry.state, entry.slot = State.LOADING, self.free.pop()
        return Load(key, entry.slot, evicted)

    def _may_displace(self) -> bool:
        held = self.speculating + self.catching_up
        return held < self.most_speculating and (bool(self.free) or bool(self.evictable.any()))

    def loaded(self, key: ExpertKey) -> State:
        """A load has ended well; returns what the expert is now."""
        entry = self.entries[key]
        assert entry.state is State.LOADING
        if entry.cancelled:
            self._drop(key)
            return State.ABSENT
        self.catching_up -= entry.used
        entry.used = False
        entry.state = State.STAGED if entry.speculative else State.RESIDENT
        self.evictable[key] = not entry.speculative and entry.pins == 0
        return entry.state

    def failed(self, key: ExpertKey) -> None:
        """A load has failed, or has ended because it was cancelled: its slot is free again."""
        assert self.entries[key].state is State.LOADING
        self._drop(key)

    def _pin(self, key: ExpertKey, entry: Entry) -> None:
        entry.pins += 1
        self.evictable[key] = False

    def _claim(self, key: ExpertKey, entry: Entry) -> None:
        """What speculation holds a slot for has been asked for."""
        self.speculating -= 1
        del self.speculative[key]
        entry.speculative = entry.cancelled = entry.stale = False

    def _withdraw(self, layer: int, wanted: set[int], request: Request) -> None:
        """The router has spoken: speculation for others of this layer was wrong."""
        for key, entry in list(self.speculative.items()):
            if key[0] != layer or key[1] in wanted or entry.cancelled:
                continue
            if entry.state is State.STAGED:
                entry.stale = True
                continue
            request.cancelled.append(key)
            if entry.state is State.QUEUED:
                self._unqueue(key)
            else:
                entry.cancelled = True

    def _unqueue(self, key: ExpertKey) -> None:
        del self.entries[key], self.speculative[key]

    def _make_room(self, layer: int, slot: bool) -> ExpertKey | None:
        """Sees to it that one more expert may be resident, and that a `slot` is free for it; returns who left."""
        may_grow = self.residents < self.capacity
        if may_grow and (self.free or not slot):
            return None
        # Without a free slot speculation holds more than its own: what it holds for nobody goes first.
        key = (self._stale() if may_grow else None) or self._victim(layer)
        self._drop(key)
        return key

    def _victim(self, layer: int, spared: int | None = None) -> ExpertKey:
        """Who leaves for an expert of `layer`; of the layer `spared`, nobody if anyone else can."""
        candidates = self.evictable
        if spared is not None:
            candidates = candidates.copy()
            candidates[spared] = False
            if not candidates.any():
                candidates = self.evictable
        if self.shares is not None:
            over = self.count > self.shares
            over[layer] = self.count[layer] >= self.shares[layer]
            above = candidates & over[:, None]
            if above.any():
                candidates = above
        scores = np.where(candidates, self.policy.scores(), np.inf)
        index = int(scores.argmin())
        key = divmod(index, scores.shape[1])
        if not candidates[key]:
            raise LookupError("every resident expert is in use")
        return key

    def _stale(self) -> ExpertKey | None:
        stale = [key for key, entry in self.speculative.items() if entry.stale]
        if not stale:
            return None
        scores = self.policy.scores()
        return min(stale, key=lambda key: (scores[key], key))

    def _drop(self, key: ExpertKey) -> None:
        entry = self.entries.pop(key)
        self.catching_up -= entry.used
        self.free.append(entry.slot)
        self.evictable[key] = False
        if entry.speculative:
            del self.speculative[key]
            self.speculating -= 1
        else:
            self.residents -= 1
            self.count[key[0]] -= 1
