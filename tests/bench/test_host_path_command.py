"""The parts of `python -m benchmarks host_path` that need no engine."""

import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from benchmarks.host_path import MEASUREMENTS, OF_LAYER, OF_STEP, STOCK, figures, print_host_path
from vllm_adapmoe.integration.measure.host_path import KERNEL, MOVE, VLLM
from vllm_adapmoe.integration.measure.part_timer import PartTimer
from vllm_adapmoe.integration.measure.thread_clock import open_clock, open_counter
from vllm_adapmoe.results import spread

PARTS = ("layer", "inner", "wait", "move")


class Clock:
    """A clock that only work moves."""

    now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, amount: int) -> None:
        self.now += amount


def test_a_part_counts_without_the_parts_within_it():
    clock, timer = Clock(), PartTimer()
    inner = timer.timed("inner", clock.work)

    def layer() -> None:
        clock.work(5)
        inner(30)
        inner(10)
        clock.work(2)

    timed = timer.timed("layer", layer)
    timed()
    assert timer.take() == {}, "measured before the start"
    timer.start(clock, PARTS)
    timed()
    timed()
    assert timer.take() == {"layer": 14, "inner": 80}
    timer.stop()
    timed()
    assert timer.take() == {}


def test_other_parts_count_for_the_part_around():
    clock, timer = Clock(), PartTimer()
    inner = timer.timed("inner", clock.work)

    def layer() -> None:
        clock.work(5)
        inner(30)

    timed = timer.timed("layer", layer)
    timer.start(clock, ["layer"])
    timed()
    assert timer.take() == {"layer": 35}


def test_a_generator_counts_only_while_it_runs():
    clock, timer = Clock(), PartTimer()

    def arrivals():
        for amount in (1, 2, 4):
            clock.work(amount)
            yield amount

    timed = timer.timed("wait", arrivals)
    timer.start(clock, PARTS)
    for amount in timed():
        clock.work(100 * amount)
    assert timer.take() == {"wait": 7}


def test_other_threads_do_not_count():
    clock, timer = Clock(), PartTimer()
    work = timer.timed("move", clock.work)
    timer.start(clock, PARTS)
    thread = threading.Thread(target=work, args=(5,))
    thread.start()
    thread.join()
    assert timer.take() == {}


def test_an_error_ends_its_part():
    clock, timer = Clock(), PartTimer()

    def fails() -> None:
        clock.work(3)
        raise ValueError("unreadable")

    timed = timer.timed("wait", fails)
    timer.start(clock, PARTS)
    for _ in range(2):
        with pytest.raises(ValueError, match="unreadable"):
            timed()
    assert timer.take() == {"wait": 6}


def test_the_timer_subtracts_its_own_cost():
    def layer(calls: int) -> None:
        for _ in range(calls):
            inner()

    timer = PartTimer()
    inner, timed = timer.timed("inner", lambda: None), timer.timed("layer", layer)
    timer.start(time.thread_time_ns, PARTS)
    calls = 20_000
    costs = []
    for _ in range(5):
        start = time.thread_time_ns()
        timed(calls)
        spent = time.thread_time_ns() - start
        costs.append((sum(timer.take().values()), spent))
    assert min(abs(cost) / spent for cost, spent in costs) < 0.3


def test_clocks_count_this_thread():
    cpu, wall = open_clock("cpu"), open_clock("wall")
    before = cpu(), wall()
    time.sleep(0.05)
    assert wall() - before[1] >= 50e6 > cpu() - before[0]


def test_a_counter_of_the_kernel():
    """Instructions need hardware; a counter in software goes the same way."""
    software, task_clock = 1, 1
    try:
        counter = open_counter(software, task_clock)
    except OSError as error:
        pytest.skip(str(error))
    before, cpu = counter(), time.thread_time_ns()
    while time.thread_time_ns() - cpu < 20e6:
        pass
    assert counter() - before == pytest.approx(20e6, rel=0.5)


def test_figures_are_medians_over_the_steps():
    steps = [(1, {VLLM: 2e3 * n, KERNEL: 4e3 * n, MOVE: 7e3, "begin": 10e3 * n, "report": 3e3 * n}) for n in (1, 2, 9)]
    measured = figures(2, steps)
    assert measured["begin"] == measured["host path"] == 10
    assert measured["stock layer"] == 6 and measured["layer"] == 6 + 3.5 + 10
    assert measured["report"] == 6, "a step's parts are per step"
    assert measured["requests"] == 1 and measured["steps"] == 3 and measured["wait"] == 0


def test_the_table_shows_every_part():
    figures_of = {name: spread([12.34, 56.78]) for name in (*OF_LAYER, *OF_STEP, "host path", "layer")}
    point = {clock: figures_of for clock in MEASUREMENTS}
    ratios = {"host_path_to_stock_layer": spread([2.5]), "host_path_to_own_stock_part": spread([1.75])}
    points = [
        {"configuration": STOCK, "batch": 1, **point},
        {"configuration": "one_short", "batch": 1, **ratios, **point},
    ]
    result = {
        "left_out": {"instructions": "[Errno 2] no"},
        "models": [{"model": "m", "layers": 2, "experts": 16, "top_k": 2, "points": points}],
    }
    output = StringIO()
    print_host_path(result, Console(file=output, width=120))
    for text in (*OF_LAYER, *(f"{part}, a step" for part in OF_STEP), "34.6", "2.50", "1.75", "[Errno 2] no"):
        assert text in output.getvalue(), text
    assert "instructions left out" in output.getvalue() and "1000 instructions" not in output.getvalue()
