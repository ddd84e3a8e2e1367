"""Tasks worked through by a few threads: nothing of them is left running, however the call ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from model_checkpoint.utils.parallel import Stop, run

DEADLINE = 30.0  # seconds that anything may take before it counts as hung


class Bell(Stop):
    """Tells those who wait for it when it is called."""

    def __init__(self) -> None:
        self.rung = threading.Event()

    @property
    def called(self) -> bool:
        return self.rung.is_set()

    @called.setter
    def called(self, value: bool) -> None:
        self.rung.set()


def test_results_come_in_the_order_of_the_tasks_and_each_runs_once() -> None:
    ran: list[int] = []

    def task(i: int) -> int:
        ran.append(i)
        return i * i

    assert run([lambda i=i: task(i) for i in range(200)], 4, Stop()) == [i * i for i in range(200)]  # type: ignore[misc]
    assert sorted(ran) == list(range(200))
    assert run([], 4, Stop()) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal; a process in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_two_interrupts_while_a_helper_works_wait_until_it_is_done() -> None:
    """Thread.join takes a running thread for ended after an interrupt, until Python 3.13."""
    stop, returned, both = Bell(), threading.Event(), threading.Barrier(2)
    early: list[bool] = []

    def task() -> None:
        both.wait(DEADLINE)  # each thread has one of the two tasks
        if threading.current_thread() is threading.main_thread():
            return
        deadline = time.monotonic() + DEADLINE
        while not stop.called and time.monotonic() < deadline:  # one that comes just before a wait is met after it
            os.kill(os.getpid(), signal.SIGINT)
            stop.rung.wait(0.1)
        assert stop.called  # the caller has met the interrupt, and waits for us, or will
        os.kill(os.getpid(), signal.SIGINT)
        early.append(returned.wait(0.3))

    with pytest.raises(KeyboardInterrupt):
        run([task, task], 2, stop)
    returned.set()
    assert early == [False]


def test_a_task_that_fails_calls_the_others_off_and_is_what_is_raised() -> None:
    stop, both = Bell(), threading.Barrier(2)
    ended: list[bool] = []

    def failing() -> None:
        both.wait(DEADLINE)
        raise OSError(28, "No space left on device")

    def long_one() -> None:
        both.wait(DEADLINE)
        ended.append(stop.rung.wait(DEADLINE))

    with pytest.raises(OSError, match="No space left"):
        run([failing, long_one, lambda: ended.append(False)], 2, stop)
    assert ended == [True]


def test_memory_that_tasks_held_is_free_when_the_call_returns() -> None:
    for _ in range(50):
        memory = bytearray(8)
        view = memoryview(memory)
        tasks = [view.tobytes, view.tobytes, view.tobytes]
        run(tasks, 3, Stop())
        tasks.clear()
        del view
        memory.append(1)  # BufferError while anything holds a view
        assert len(memory) == 9
