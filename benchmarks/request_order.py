"""Replays a loaded server whose requests run in several orders, with recorded routing and the cache's own decisions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.request_routing import Routing
from vllm_adapmoe.experts import CacheShape
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.controller import CacheController
from vllm_adapmoe.scheduling.arrivals import Arrivals
from vllm_adapmoe.scheduling.batches import Batches, QueuedRequest
from vllm_adapmoe.scheduling.costs import Mean, StepCosts
from vllm_adapmoe.scheduling.prefill import WaitingPrompt, hold_prefill
from vllm_adapmoe.scheduling.report import StepTimes
from vllm_adapmoe.scheduling.text_signatures import TextSignatures
from vllm_adapmoe.simulate.replay import waves

WARM_SHARE = 0.25
"""Share of the tokens that are produced before the measurement begins."""
PHASE_STEPS = 4
MAX_PREFILL_DELAY, MAX_OVERTAKES = 0.5, 4.0
"""The product's defaults, seconds and batches."""


@dataclass(eq=False)
class ReplayedRequest:
    """A request of the replay: an excerpt, of which the first tokens are the prompt and the next ones the answer."""

    name: str
    kind: int
    excerpt: int
    prompt: int
    answer: int
    arrived: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    """Tokens of the answer so far."""


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """A server under constant load, and the machine that it runs on."""

    fraction: float
    """Share of the experts that is resident."""
    seats: int
    """Maximum number of running requests."""
    clients: int
    """Clients; each sends its next request when the last one has been answered."""
    load_seconds: float
    """Seconds of one expert fetch."""
    layer_seconds: float
    """Seconds of computing of one layer in a step."""
    prompt_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    tokens: int
    """Tokens to produce."""


class Order:
    """vLLM's order: requests start in order of arrival, and every running one is part of every step."""

    def __init__(self, spec: ReplaySpec, routing: Routing) -> None:
        self.spec, self.routing = spec, routing

    def start(self, waiting: list[ReplayedRequest], running: list[ReplayedRequest]) -> list[ReplayedRequest]:
        """Returns the waiting requests to start in this step."""
        return waiting[: self.spec.seats - len(running)]

    def decode(self, running: list[ReplayedRequest]) -> list[ReplayedRequest]:
        """Returns the running requests to decode in a step without prompts."""
        return running

    def ended(self, request: ReplayedRequest) -> None:
        """Records that a request has been answered."""


class Kinds(Order):
    """Starts requests of the kind that most running requests are of. Knows the kinds: a bound for real rules."""

    def start(self, waiting: list[ReplayedRequest], running: list[ReplayedRequest]) -> list[ReplayedRequest]:
        left, chosen = list(waiting), []
        counts = np.bincount([request.kind for request in running], minlength=len(self.routing.kinds))
        for _ in range(min(self.spec.seats - len(running), len(left))):
            index = int(np.argmax([counts[request.kind] for request in left]))
            counts[left[index].kind] += 1
            chosen.append(left.pop(index))
        return chosen


class Phases(Order):
    """Decodes one kind of requests for some steps, then the next. Knows the kinds."""

    kind, steps = 0, 0

    def decode(self, running: list[ReplayedRequest]) -> list[ReplayedRequest]:
        kinds = sorted({request.kind for request in running})
        self.steps += 1
        if self.steps > PHASE_STEPS or self.kind not in kinds:
            self.kind, self.steps = next((kind for kind in kinds if kind > self.kind), kinds[0]), 1
        return [request for request in running if request.kind == self.kind]


class SimilarTexts(Order):
    """Starts batches of similar texts, by the rules of `scheduling.batches` and `scheduling.text_signatures`."""

    def __init__(self, spec: ReplaySpec, routing: Routing) -> None:
        super().__init__(spec, routing)
        self.texts, self.batches, self.running = TextSignatures(), Batches(MAX_OVERTAKES), Mean()
        self.known: dict[str, QueuedRequest] = {}

    def start(self, waiting: list[ReplayedRequest], running: list[ReplayedRequest]) -> list[ReplayedRequest]:
        seats = self.spec.seats - len(running)
        self.running.add(len(running))
        size = max(1, round(self.running.value or seats))
        queue = []
        for request in waiting[: self.batches.window(size, seats)]:
            if request.name not in self.known:
                prompt = self.routing.tokens[request.kind][request.excerpt, : request.prompt]
                self.known[request.name] = QueuedRequest(request.name, self.texts.signature(prompt))
            queue.append(self.known[request.name])
        names = [chosen.name for chosen in self.batches.choose(queue, seats, size)]
        self.batches.started(queue, names, size)
        by_name = {request.name: request for request in waiting}
        return [by_name[name] for name in names]

    def ended(self, request: ReplayedRequest) -> None:
        del self.known[request.name]
        self.texts.learn(self.routing.tokens[request.kind][request.excerpt, : request.prompt + request.answer])


@dataclass
class Cache:
    """The worker's cache; loads take their time one after another."""

    spec: ReplaySpec
    routing: Routing
    controller: CacheController = field(init=False)

    def __post_init__(self) -> None:
        _, _, layers, top_k = self.routing.experts[0].shape
        count = self.routing.num_experts
        shape = CacheShape([count] * layers, top_k, [0] * layers, [1] * layers)
        self.controller = CacheController(shape, CacheSetup([int(self.spec.fraction * layers * count)], "next_use"))

    @property
    def resident(self) -> np.ndarray:
        return self.controller.pools[0].slots >= 0

    def loads(self, decoding: Sequence[ReplayedRequest], starting: Sequence[ReplayedRequest]) -> int:
        """Runs one step, and returns how many experts it has loaded."""
        used = np.zeros_like(self.resident)
        rows = [
            self.routing.experts[request.kind][request.excerpt, request.prompt + request.tokens - 1][None]
            for request in decoding
        ] + [self.routing.experts[request.kind][request.excerpt, : request.prompt] for request in starting]
        for layer in range(len(used)):
            for tokens in rows:
                used[layer, tokens[:, layer].ravel()] = True
        loads = 0
        for layer in range(len(used)):
            experts = np.flatnonzero(used[layer])
            groups = waves(experts, self.controller.residency(layer).capacity)
            for group in groups:
                request = self.controller.begin(layer, group, experts if len(groups) > 1 else ())
                for load in request.loads:
                    self.controller.transfer_ended(load.key, 1, complete=True)
                loads += len(request.loads)
                self.controller.release(layer, group)
        return loads


@dataclass
class Times:
    """Times of the requests of one replay, seconds, and the steps' loads, all after the warm-up."""

    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    loads: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Returns the figures of a result."""
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "loads_per_token": self.loads / self.tokens,
            **{
                f"{name}_p{share}_ms": 1e3 * float(np.percentile(values, share))
                for name, values in (("ttft", self.first), ("tpot", self.per_token), ("itl", self.gaps))
                for share in (50, 99)
            },
            "ttft_max_ms": 1e3 * max(self.first),
        }


def replay_order(spec: ReplaySpec, routing: Routing, order: Order, holds_prompts: bool, seed: int) -> dict[str, float]:
    """Replays the server, and returns its figures.

    Args:
        spec: the server.
        routing: recorded excerpts, at least `clients` of them.
        order: decides which requests run.
        holds_prompts: whether prompts wait for one another, by the rule of `scheduling.prefill`.
        seed: of the requests' kinds, excerpts and lengths.
    """
    generator = np.random.default_rng(seed)
    cache, costs, arrivals, times = Cache(spec, routing), StepCosts(), Arrivals(), Times()
    layers = len(cache.resident)
    waiting: list[ReplayedRequest] = []
    running: list[ReplayedRequest] = []
    now = begun = 0.0
    begun_prompts = produced = sent = 0
    waiting_since: dict[int, float] = {}

    def send() -> None:
        nonlocal sent
        busy = {(request.kind, request.excerpt) for request in waiting + running}
        while True:
            kind = int(generator.integers(len(routing.kinds)))
            excerpt = int(generator.integers(len(routing.tokens[kind])))
            if (kind, excerpt) not in busy:
                break
        low, high = spec.prompt_tokens
        prompt = round(float(np.exp(generator.uniform(np.log(low), np.log(high)))))
        answer = int(generator.integers(spec.answer_tokens[0], spec.answer_tokens[1] + 1))
        waiting.append(ReplayedRequest(f"r{sent}", kind, excerpt, prompt, answer, now, last=now))
        sent += 1

    while produced < spec.tokens:
        while len(waiting) + len(running) < spec.clients:
            send()
        measured = produced >= WARM_SHARE * spec.tokens
        begun = begun or (now if measured else 0.0)
        could = min(spec.seats - len(running), len(waiting))
        arrivals.observe(now, begun_prompts + could)
        prompts = [WaitingPrompt(now - waiting_since.setdefault(place, now), 1) for place in range(could)]
        gap, decoding = arrivals.gap(now), [0] * len(running)
        held = holds_prompts and hold_prefill(prompts, decoding, costs.surcharge, gap, 2048, MAX_PREFILL_DELAY)
        starting = order.start(waiting, running) if could and not held else []
        if starting:
            waiting_since.clear()
        waiting = [request for request in waiting if request not in starting]
        begun_prompts += len(starting)
        decoded = running if starting else order.decode(running)
        loads = cache.loads(decoded, starting)
        stall = loads * spec.load_seconds
        seconds = stall + layers * spec.layer_seconds
        costs.observe(StepTimes(seconds, stall, bool(starting)))
        now += seconds
        for request in decoded + starting:
            if not request.tokens:
                request.first = now
            elif measured:
                times.gaps.append(now - request.last)
            request.last = now
            request.tokens += 1
            if request.tokens == request.answer:
                order.ended(request)
                if begun and request.first > begun:
                    times.first.append(request.first - request.arrived)
                    times.per_token.append((now - request.first) / (request.answer - 1))
        produced += len(decoded) + len(starting)
        if measured:
            times.loads += loads
            times.tokens += len(decoded) + len(starting)
            times.seconds += seconds
        running = [request for request in running + starting if request.tokens < request.answer]
    return times.figures()


ORDERS: dict[str, tuple[type[Order], bool]] = {
    "vllm_order": (Order, False),
    "held_prompts": (Order, True),
    "phases": (Phases, True),
    "kinds": (Kinds, True),
    "similar_texts": (SimilarTexts, True),
}
"""Orders to compare, and whether prompts wait for one another."""


def compare(spec: ReplaySpec, routing: Routing, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the figures of every order, round by round; a round's requests are the same for all."""
    return {
        name: [replay_order(spec, routing, order(spec, routing), holds, seed) for seed in range(rounds)]
        for name, (order, holds) in ORDERS.items()
    }
