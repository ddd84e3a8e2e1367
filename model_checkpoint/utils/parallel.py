"""Tasks worked through by a few threads and the caller together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread, current_thread
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


class Stop:
    """Calls work off. An Event is written in Python, and a Ctrl-C between its lines would leave it locked.

    Attributes:
        called: whether it is; set by whoever calls it off.
    """

    called = False


def run(tasks: Sequence[Callable[[], Result]], threads: int, stop: Stop | None = None) -> list[Result]:
    """Call every task once and return their results, in the order of the tasks.

    The threads live as long as this call: nothing has to be closed, and a fork finds none of them idle.

    Args:
        tasks: begun in their order.
        threads: how many work at once, the caller's included.
        stop: called when a task fails or the caller is interrupted; tasks that take long should look at it and raise.

    Raises:
        BaseException: the interrupt that came, else what the first task that failed raised; no task runs any more.
    """
    given, stop = list(tasks), stop or Stop()
    results: list[Result | None] = [None] * len(given)
    failures: list[BaseException] = []
    waiting = iter(range(len(given)))
    working: set[Thread] = set()
    ended: SimpleQueue[None] = SimpleQueue()

    def work() -> None:
        try:
            for i in waiting:  # one iterator for all: each task is taken by one thread
                if stop.called:
                    return
                results[i] = given[i]()
        except BaseException as error:  # noqa: BLE001 - raised below, when nobody works any more
            failures.append(error)
            stop.called = True

    def help_out() -> None:
        working.add(current_thread())  # before it looks at what is to do: who is not in here yet will find nothing
        work()
        working.discard(current_thread())
        ended.put(None)

    def begin() -> None:
        for _ in range(min(threads, len(given)) - 1):
            if not start(Thread(target=help_out, name="checkpoint files", daemon=True)):
                break
        work()

    interrupts = wait_while(lambda: bool(working), ended, begin, stop)
    given.clear()  # a helper's frame may outlive this call for a moment, and must not keep memory borrowed
    if failures or interrupts:
        raise [*interrupts, *failures][0]  # what a helper raised because of an interrupt is not the news
    return results  # type: ignore[return-value]


def wait_while(
    condition: Callable[[], bool],
    changed: SimpleQueue[None],
    begin: Callable[[], object] | None = None,
    stop: Stop | None = None,
) -> list[BaseException]:
    """Wait, whatever happens, until ``condition`` no longer holds.

    ``Thread.join`` is no use for this: until Python 3.13, one that was interrupted takes the thread for ended.

    Args:
        condition: asked after every change.
        changed: gets an item after every change.
        begin: called first, unless an interrupt comes before; where one comes within, not again.
        stop: called at an interrupt.

    Returns:
        What was raised meanwhile, by ``begin`` or as interrupts, for the caller to raise.
    """
    interrupts: list[BaseException] = []
    while True:
        try:
            while True:
                try:
                    if interrupts and stop is not None:
                        stop.called = True
                    elif begin is not None:
                        first, begin = begin, None
                        first()
                    while condition():
                        changed.get()
                    return interrupts
                except BaseException as error:  # noqa: BLE001 - the caller raises it
                    interrupts.append(error)
        except BaseException as error:  # noqa: BLE001 - one that came between the lines of the handler above
            interrupts.append(error)
