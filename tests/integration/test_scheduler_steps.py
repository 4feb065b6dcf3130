"""vLLM's real schedulers, sync and async, with prompts held back and reordered: no engine, made-up answers.

The CPU platform of vLLM never schedules ahead, so this is where the async scheduler runs on this machine.
"""

import random
from collections import deque
from itertools import count

import pytest
import torch
from conftest import TINY_MIXTRAL
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_adapmoe.integration.reported_output import with_report
from vllm_adapmoe.integration.scheduler import scheduler as ours
from vllm_adapmoe.scheduling.report import StepTimes, WorkerReport, prompt_rows

pytestmark = pytest.mark.versions

BLOCK = 16
STEP, SWEEP = 0.010, 0.200
"""Seconds that a decode step and a step with a prompt wait for experts."""
STOCK = {False: Scheduler, True: AsyncScheduler}
OURS = {False: ours.ExpertCacheScheduler, True: ours.ExpertCacheAsyncScheduler}
WORDS = 90
"""Tokens that the prompts of one kind are of; other kinds use others."""


class Clock:
    """Of the scheduler's module: time passes as the made-up worker says."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(ours.time, "monotonic", lambda: self.now)


class Server:
    """A scheduler, and a worker that answers every step, as deep in flight as vLLM's engine core keeps it."""

    stall_share = 0.9
    """Share of a step that waits for experts."""

    def __init__(self, cls, is_async, clock, blocks=1000, policy="fcfs", seats=16, drafts=0, **scheduler):
        config = EngineArgs(
            model=str(TINY_MIXTRAL), skip_tokenizer_init=True, max_model_len=512, max_num_seqs=seats,
            max_num_batched_tokens=256, scheduling_policy=policy, moe_method="adapmoe",
            adapmoe_config={"cache_fraction": 0.5, "scheduler": scheduler},
            speculative_config={"method": "ngram", "num_speculative_tokens": drafts} if drafts else None,
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = is_async
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = cls(config, cache, StructuredOutputManager(config), BLOCK, log_stats=True)
        self.clock = clock
        self.depth = 2 if is_async else 1
        self.in_flight = deque()
        self.tokens: dict[str, list[float]] = {}
        """Of each request, when it got each token."""
        self.arrived: dict[str, float] = {}
        self.steps: list[dict[str, int]] = []
        self.finished: dict[str, int] = {}
        self.kinds: dict[str, int] = {}
        self.ids = count()

    def add(self, prompt=20, tokens=8, kind=0, priority=0, seed=None):
        name = f"r{next(self.ids)}"
        generator = random.Random(name if seed is None else seed)
        ids = [2 + WORDS * kind + generator.randrange(WORDS) for _ in range(prompt)]
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        params.update_from_generation_config({}, 1)
        self.scheduler.add_request(Request(name, ids, params, None, priority=priority, block_hasher=self.hasher))
        self.tokens[name], self.arrived[name], self.kinds[name] = [], self.clock.now, kind
        return name

    def step(self):
        """Schedules one step, and takes in the oldest if enough are in flight."""
        ran = False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append(output)
            ran = bool(output.num_scheduled_tokens)
            if ran:
                self.steps.append(dict(output.num_scheduled_tokens))
        if self.in_flight and (len(self.in_flight) >= self.depth or not ran):
            self.answer(self.in_flight.popleft())

    def answer(self, output):
        names = list(output.num_scheduled_tokens)
        prefill = prompt_rows(output.num_scheduled_tokens, output.scheduled_spec_decode_tokens) > 0
        seconds = SWEEP if prefill else STEP
        self.clock.now += seconds if names else 0.001
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            done = request is not None and not request.is_prefill_chunk
            sampled.append([5] if done else [])
        answer = ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, sampled)
        report = WorkerReport(times=[StepTimes(seconds, seconds * self.stall_share, prefill)])
        for one in self.scheduler.update_from_output(output, with_report(answer, report)).values():
            for result in one.outputs:
                self.tokens[result.request_id] += [self.clock.now] * len(result.new_token_ids)
                if result.finish_reason is not None:
                    self.finished[result.request_id] = len(self.tokens[result.request_id])

    def run(self, limit=3000):
        for _ in range(limit):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps: {self.scheduler.get_request_counts()}")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request):
    return request.param


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def sweeps(server) -> int:
    return sum(any(rows > 1 for rows in step.values()) for step in server.steps)


def warm(server, decoding=4, tokens=400):
    """Requests that decode, so that prices are known."""
    names = [server.add(tokens=tokens) for _ in range(decoding)]
    for _ in range(20):
        server.step()
    server.add(tokens=2)
    for _ in range(20):
        server.step()
    assert server.scheduler.costs.surcharge > 0
    return names


def trickle(server, requests=12):
    """A request arrives every other step."""
    for _ in range(requests):
        server.add(tokens=4)
        for _ in range(2):
            server.step()
    for _ in range(60):
        server.step()


def test_prompts_gather(is_async, clock):
    results = {}
    for enabled in (False, True):
        server = Server(OURS[is_async], is_async, clock, enabled=enabled, max_prefill_delay_ms=400)
        if enabled:
            warm(server)
        else:
            for _ in range(4):
                server.add(tokens=400)
            for _ in range(40):
                server.step()
        before = sweeps(server)
        trickle(server)
        results[enabled] = sweeps(server) - before
        if enabled:
            assert server.scheduler.held_prefill_steps > 0
            waits = [times[0] - server.arrived[name] for name, times in server.tokens.items() if times]
            # Asked again after a step; then its own step and, with steps scheduled ahead, the one before it.
            assert max(waits) <= 0.4 + STEP + (1 + is_async) * SWEEP
        server.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert results[True] <= results[False] / 2


def test_no_delay_allowed_is_vllms_own_order(is_async, clock):
    """Step by step the same as stock, with the limits at zero, disabled, and where no expert is ever fetched."""

    def steps(cls, **scheduler):
        clock.now = 1000.0
        server = Server(cls, is_async, clock, **scheduler)
        for kind in (0, 1, 0, 1):
            server.add(tokens=30, kind=kind)
        trickle(server)
        server.run()
        return server.steps

    stock = steps(STOCK[is_async])
    assert steps(OURS[is_async], enabled=False) == stock
    assert steps(OURS[is_async], max_prefill_delay_ms=0, max_overtakes=0) == stock


def kinds_together(server) -> float:
    """Mean share of a decode step's requests that are of the kind of most of them, once some have ended."""
    shares = []
    for step in server.steps[len(server.steps) // 3 :]:
        kinds = [server.kinds[name] for name, rows in step.items() if rows == 1]
        if len(kinds) >= 3:
            shares.append(max(kinds.count(kind) for kind in set(kinds)) / len(kinds))
    return sum(shares) / len(shares)


def queue_of_two_kinds(server, requests=120, shortest=8):
    """More requests than seats, so that requests wait; returns their names in order of arrival."""
    chance = random.Random(3)
    names = [server.add(tokens=chance.randrange(shortest, 24), kind=chance.randrange(2)) for _ in range(requests)]
    server.run()
    assert len(server.finished) == requests
    return names


def test_similar_requests_run_together_and_nobody_starves(is_async, clock):
    together, last_overtaken = {}, {}
    for limit in (0, 4):
        server = Server(OURS[is_async], is_async, clock, seats=4, max_overtakes=limit, max_prefill_delay_ms=0)
        names = queue_of_two_kinds(server)
        together[limit] = kinds_together(server)
        begun = sorted(names, key=lambda name: server.tokens[name][0])
        last_overtaken[limit] = max(
            sum(other > number for other in map(names.index, begun[: begun.index(name)]))
            for number, name in enumerate(names)
        )
        assert (server.scheduler.overtakes > 0) == (limit > 0)
        assert not server.scheduler.order or not server.scheduler.order._queued, "names are kept for ever"
    assert together[0] < 0.75 and together[4] > together[0] + 0.1, together
    assert last_overtaken[0] == 0
    # The limit, and those that start in the same step.
    assert 4 < last_overtaken[4] <= 4 * 4 + 4


def test_a_burst_on_a_new_server_is_read_again_as_texts_become_known(is_async, clock):
    """All of its requests wait before any text is known."""
    server = Server(OURS[is_async], is_async, clock, seats=4, max_prefill_delay_ms=0)
    queue_of_two_kinds(server, requests=16)
    assert server.scheduler.overtakes > 0


def test_a_batch_whose_requests_end_together_is_followed_by_another(is_async, clock):
    """With equal lengths hardly anything runs when the next batch starts."""
    server = Server(OURS[is_async], is_async, clock, seats=4, max_prefill_delay_ms=0)
    queue_of_two_kinds(server, shortest=23)
    assert kinds_together(server) > 0.85


def test_requests_start_in_order_of_arrival_where_hardly_anything_is_loaded(is_async, clock):
    server = Server(OURS[is_async], is_async, clock, seats=4, max_prefill_delay_ms=0)
    server.stall_share = 0.05
    queue_of_two_kinds(server)
    assert server.scheduler.overtakes == 0


def test_priorities_are_vllms(is_async, clock):
    server = Server(OURS[is_async], is_async, clock, seats=4, policy="priority", max_prefill_delay_ms=0)
    queue_of_two_kinds(server)
    assert server.scheduler.order is None and server.scheduler.overtakes == 0


def test_drafts_take_rows_of_a_step(is_async, clock):
    """Every draft is rejected; here only asynchronous scheduling drafts, as no worker does."""
    server = Server(OURS[is_async], is_async, clock, max_prefill_delay_ms=0, drafts=3)
    names = [server.add(tokens=50, kind=kind) for kind in (0, 0, 0, 0, 0, 0, 1, 1)]
    server.run()
    assert [server.finished[name] for name in names] == [50] * 8
    assert max(rows for step in server.steps[4:] for rows in step.values()) == (4 if is_async else 1)


def test_urgent_requests_are_not_held_for_others(is_async, clock):
    server = Server(OURS[is_async], is_async, clock, policy="priority", max_prefill_delay_ms=400)
    names = [server.add(tokens=400, priority=5) for _ in range(4)]
    for _ in range(20):
        server.step()
    server.add(tokens=2, priority=5)
    for _ in range(20):
        server.step()
    assert server.scheduler.costs.surcharge > 0
    urgent, patient = server.add(priority=0), server.add(priority=9)
    server.step()
    assert urgent in server.steps[-1]
    for name in (*names, urgent):
        server.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    server.run()
    assert server.finished[patient] == 8


def test_every_request_ends_under_preemption_and_with_a_shared_prefix(is_async, clock):
    """Few blocks, so that running requests are preempted, and prompts that the prefix cache knows."""
    server = Server(OURS[is_async], is_async, clock, blocks=24, seats=8, max_prefill_delay_ms=300)
    chance = random.Random(1)
    for number in range(40):
        server.add(chance.choice((5, 40, 90)), chance.choice((3, 30, 60)), kind=number % 2, seed=number % 3)
        for _ in range(chance.randrange(6)):
            server.step()
    server.run()
    assert len(server.finished) == 40
    for name, tokens in server.finished.items():
        assert tokens in (3, 30, 60), name
    scheduler = server.scheduler
    order = scheduler.order
    assert not scheduler._waiting_since and not order._queued and not order._running, "names are kept for ever"
    assert scheduler.kv_cache_manager.usage == 0


def test_aborted_while_held(is_async, clock):
    server = Server(OURS[is_async], is_async, clock, max_prefill_delay_ms=10_000)
    warm(server, decoding=8)
    name = server.add()
    server.step()
    assert name not in server.steps[-1] and server.scheduler.held_prefill_steps > 0
    server.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    other = server.add(tokens=3)
    server.run()
    assert server.finished[other] == 3 and name not in server.finished
