"""Tasks worked through by a few threads and the caller together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import TypeVar

Result = TypeVar("Result")


_ENOUGH = 16  # threads that keep any disk busy; each has some memory of its own


def default_threads() -> int:
    """Return how many threads to use: one for each core that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _ENOUGH)


def start(thread: Thread) -> bool:
    """Start a thread; returns whether that was possible: not when there are too many, or the interpreter ends."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def run(tasks: Sequence[Callable[[], Result]], threads: int, stop: Event) -> list[Result]:
    """Call every task once and return their results, in the order of the tasks.

    The threads live as long as this call: nothing has to be closed, and a fork finds none of them idle.

    Args:
        tasks: begun in their order.
        threads: how many work at once, the caller's included.
        stop: set when a task fails or the caller is interrupted; tasks that take long should look at it and raise.

    Raises:
        BaseException: what the first task that failed raised, when no task is running any more.
    """
    results: list[Result | None] = [None] * len(tasks)
    failures: list[BaseException] = []
    waiting = iter(range(len(tasks)))

    def work() -> None:
        try:
            for i in waiting:  # one iterator for all: each task is taken by one thread
                if stop.is_set():
                    return
                results[i] = tasks[i]()
        except BaseException as error:  # noqa: BLE001 - raised below, when nobody works any more
            failures.append(error)
            stop.set()

    helpers = [Thread(target=work, name="checkpoint files", daemon=True) for _ in range(min(threads, len(tasks)) - 1)]
    try:
        for helper in helpers:
            if not start(helper):
                break
        work()
    except BaseException as error:  # noqa: BLE001 - an interrupt between the tasks; raised below, too
        failures.append(error)
    stopped = join(helpers, stop)
    if failures or stopped:
        raise [*stopped, *failures][0]  # what a helper raised because of an interrupt is not the news
    return results  # type: ignore[return-value]


def join(threads: Sequence[Thread], stop: Event) -> list[BaseException]:
    """Wait until the threads that were started have ended, whatever happens; returns the interrupts met meanwhile."""
    interrupts: list[BaseException] = []
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                stop.set()
                interrupts.append(error)
    return interrupts
