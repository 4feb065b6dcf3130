"""Runs threads one at a time, in an order that a seed chooses; what they share is Python's `threading`, as a stand-in.

A thread goes on until it comes to a point where another could: taking a lock, waiting, or whatever calls `pause`. There
the schedule draws who goes on. So every interleaving can be run again from its seed, and none of it takes real time.
"""

import _thread
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Stopped(BaseException):
    """The schedule has ended: unwinds the threads that have not."""


class Deadlock(Exception):
    """No thread can go on, and nothing that they wait for will come."""


class Task:
    """A thread, and what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = _thread.allocate_lock()
        self.turn.acquire()
        self.ready: Callable[[], bool] | None = None
        """Whether it can go on; None: it can."""
        self.waits_for = ""
        self.ended = False


class Schedule:
    """The order in which threads run; itself what a module under test uses in place of `threading`.

    Args:
        seed: of the order.
        advance: lets time pass for what is no thread (a device): returns whether there was anything to do.
        eager: chance that time passes at a pause.
    """

    def __init__(self, seed: int, advance: Callable[[], bool] = lambda: False, eager: float = 0.5) -> None:
        self.random = random.Random(seed)
        self.advance, self.eager = advance, eager
        self.tasks = [Task("asks")]
        self.running = self.tasks[0]
        self.error: BaseException | None = None
        """What ended the schedule before its time."""
        self.pauses = 0

    def pause(self) -> None:
        """A point where another thread may go on."""
        self.pauses += 1
        self._check()
        while self.random.random() < self.eager and self.advance():
            pass
        able = [task for task in self.tasks if not task.ended and (task.ready is None or task.ready())]
        self._switch(self.random.choice(able))

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Blocks this thread until `ready`, which other threads, or time, bring about."""
        me = self.running
        while not ready():
            self._check()
            me.ready, me.waits_for = ready, what
            able = [task for task in self.tasks if not task.ended and (task.ready is None or task.ready())]
            if able and not (self.random.random() < self.eager and self.advance()):
                self._switch(self.random.choice(able))
            elif not able and not self.advance():
                waits = ", ".join(f"{task.name}: {task.waits_for}" for task in self.tasks if not task.ended)
                self._fail(Deadlock(f"no thread can go on ({waits})"))
            me.ready = None
        self._check()

    def _switch(self, task: Task) -> None:
        me = self.running
        if task is me:
            return
        self.running = task
        task.turn.release()
        me.turn.acquire()
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            if self.running is self.tasks[0] and not isinstance(self.error, Stopped):
                raise self.error
            raise Stopped

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._check()

    def start(self, name: str, run: Callable[[], None]) -> Task:
        """A new thread; it runs when it is its turn."""
        task = Task(name)

        def body() -> None:
            task.turn.acquire()
            try:
                self._check()
                run()
            except Stopped:
                pass
            except BaseException as error:
                self.error = self.error or error
            task.ended = True
            self._pass_on()

        self.tasks.append(task)
        threading.Thread(target=body, name=name, daemon=True).start()
        return task

    def _pass_on(self) -> None:
        """The running thread has ended: another goes on."""
        while True:
            left = [task for task in self.tasks if not task.ended]
            able = [task for task in left if self.error is not None or task.ready is None or task.ready()]
            if able:
                self.running = self.random.choice(able)
                self.running.turn.release()
                return
            if not self.advance():
                self.error = Deadlock(f"no thread can go on ({', '.join(f'{t.name}: {t.waits_for}' for t in left)})")

    def end(self) -> None:
        """Unwinds what has not ended; called by the first thread, last."""
        self.error = self.error or Stopped()
        me = self.tasks[0]
        me.ended = True
        for task in self.tasks:
            if not task.ended:
                self.running = task
                me.ended = False  # that thread passes on to this one
                task.turn.release()
                me.turn.acquire()
                me.ended = True

    # What stands in for `threading`

    def Lock(self) -> "Lock":
        return Lock(self)

    def Condition(self, lock: "Lock") -> "Condition":
        return Condition(self, lock)

    def Thread(self, target: Callable[[], None], name: str, daemon: bool) -> "Thread":
        return Thread(self, target, name)


class Lock:
    """`threading.Lock`."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.holder: Task | None = None

    def __enter__(self) -> None:
        self.schedule.pause()
        self.take()

    def take(self) -> None:
        assert self.holder is not self.schedule.running, "a thread waits for a lock that it holds"
        self.schedule.wait_until(lambda: self.holder is None, "a lock")
        self.holder = self.schedule.running

    def __exit__(self, *exception: object) -> None:
        self.holder = None


class Condition:
    """`threading.Condition`."""

    def __init__(self, schedule: Schedule, lock: Lock) -> None:
        self.schedule, self.lock = schedule, lock
        self.waiting: deque[list[bool]] = deque()

    def __enter__(self) -> None:
        self.lock.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.lock.__exit__(*exception)

    def wait(self) -> None:
        assert self.lock.holder is self.schedule.running
        woken = [False]
        self.waiting.append(woken)
        self.lock.holder = None
        self.schedule.wait_until(lambda: woken[0] and self.lock.holder is None, "a condition")
        self.lock.holder = self.schedule.running

    def notify(self) -> None:
        assert self.lock.holder is self.schedule.running
        if self.waiting:
            self.waiting.popleft()[0] = True

    def notify_all(self) -> None:
        while self.waiting:
            self.notify()


class Thread:
    """`threading.Thread`."""

    def __init__(self, schedule: Schedule, target: Callable[[], None], name: str) -> None:
        self.schedule, self.target, self.name = schedule, target, name
        self.task: Any = None

    def start(self) -> None:
        self.task = self.schedule.start(self.name, self.target)

    def is_alive(self) -> bool:
        return not self.task.ended

    def join(self) -> None:
        self.schedule.wait_until(lambda: self.task.ended, f"the end of {self.name}")
