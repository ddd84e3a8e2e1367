"""Saves that go on while training does: in the order of their calls, one at a time, and a bounded number of them.

The thread that saves lives as long as there is something to save. It is no daemon, so the interpreter waits for it when
it exits; and nothing is left to close, or to get lost in a fork, when all is saved.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from itertools import count
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar
from weakref import ReferenceType, ref

from model_checkpoint.checkpoint.snapshot import SnapshotBuffer
from model_checkpoint.errors import SaveFailedError
from model_checkpoint.hooks.threads import acting_thread
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.parallel import start

log = logging.getLogger(__name__)
_INIT = 1  # the first process of a container, which the kernel does not end by a signal that nobody handles
Taken = TypeVar("Taken")


class SaveQueue:
    """The background saves of one manager; any thread may use it.

    Args:
        limit: how many may be pending; each has a snapshot in memory.

    Attributes:
        jobs: what is pending, by checkpoint, in the order of the calls, of which the first runs; None while the
            snapshot is taken.
        failures: what nobody was told of yet, by checkpoint.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.after_fork_in_child()
        watch(self)
        number = next(_numbers)
        _queues[number] = ref(self, lambda _: _queues.pop(number, None))

    def before_fork(self) -> None:
        """Nothing has to rest: what the thread uses does, and the child starts without it."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Forget what is pending: it is the parent's, whose thread goes on with it."""
        # No Condition, no Event: they are written in Python, and a Ctrl-C between their lines would leave them locked.
        self._lock = threading.Lock()
        self._bells: list[SimpleQueue[None]] = []  # of those who wait for a change
        self.jobs: dict[str, Callable[[], object] | None] = {}
        self.failures: dict[str, BaseException] = {}
        self._spare: list[SnapshotBuffer] = []
        self._running: str | None = None
        self._worker: threading.Thread | None = None

    def wait_for_room(self) -> None:
        """Wait until a further save would not have to wait; another thread's may come first all the same."""
        self._wait_until(lambda: len(self.jobs) < self._limit)

    def submit(
        self, checkpoint_id: str, snapshot: Callable[[SnapshotBuffer], Taken], save: Callable[[Taken], object]
    ) -> None:
        """Wait until there is room, take a snapshot, and save it in the background.

        Where no thread can be started any more, as at the end of the interpreter, it is saved before this returns.

        Args:
            checkpoint_id: of the checkpoint.
            snapshot: called once, before this returns, with memory that is its own until ``save`` has ended.
            save: called once with what ``snapshot`` returned, in the background, after all saves before it.
        """
        try:
            self._wait_until(lambda: self._take_place(checkpoint_id))
            started = self._worker is not None or self._start()  # it waits while the snapshot is taken
            with self._lock:
                buffer = self._spare.pop() if self._spare else SnapshotBuffer()
            taken = snapshot(buffer)

            def job() -> None:
                try:
                    save(taken)
                finally:  # also where the traceback of a failure is kept, and with it what is in these frames
                    self._spare.append(buffer)

            end_after_saves_at_sigterm()
            with self._lock:
                self.jobs[checkpoint_id] = job
            self._ring()
            if not started:
                self._work()
        except BaseException:
            with self._lock:
                if self._running != checkpoint_id and (self._worker is None or self.jobs.get(checkpoint_id) is None):
                    self.jobs.pop(checkpoint_id, None)  # nobody will do it
            self._ring()
            _end_if_idle()
            raise

    def _take_place(self, checkpoint_id: str) -> bool:
        ending = _ending and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        ending = ending or (threading.current_thread().daemon and _only_saves_are_left())
        if len(self.jobs) >= self._limit or (ending and not any(queue.is_worker() for queue in _all_queues())):
            return False  # the latter for good: what is acknowledged now would be lost. A worker's is waited for
        self.jobs[checkpoint_id] = None
        return True

    def _work(self) -> None:
        """Do what is pending. Of several threads that are started for that, the first one does it."""
        with self._lock:
            if self._worker is not None:
                return
            self._worker = threading.current_thread()
        try:
            while (mine := self._next()) is not None:
                self._do(mine)
        finally:
            with self._lock:
                died = self._worker is threading.current_thread()  # it is None where all is done
                if died:
                    self._worker = None
            if died and self.jobs and not self._start():
                self._work()  # those who wait must not wait for ever

    def _start(self) -> bool:
        if threading.current_thread() is threading.main_thread() and not threading.main_thread().is_alive():
            return False  # an atexit callback: before Python 3.12 nobody waits for a thread that is started now
        return start(threading.Thread(target=self._work, name="checkpoint saves", daemon=False))

    def _next(self) -> str | None:
        """Wait for the first job's snapshot and note it as running; None when there is no job, and no worker any more.

        What was chosen is told by this, not by ``_running``: when the lock is free, another worker may set that.
        """
        chosen: list[str | None] = []

        def choose() -> bool:
            first = next(iter(self.jobs), None)
            if first is not None and self.jobs[first] is None:
                return False  # its snapshot is being taken
            self._running = first
            if first is None:
                self._worker = None
            chosen.append(first)
            return True

        self._wait_until(choose)
        return chosen[-1]

    def _do(self, checkpoint_id: str) -> None:
        failure: BaseException | None = None
        job = self.jobs[checkpoint_id]
        try:
            if job is not None:
                job()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks
            failure = error
        del job  # and with it the snapshot of a save that failed
        with self._lock:
            if failure is not None:
                self.failures[checkpoint_id] = failure
            del self.jobs[checkpoint_id]
            self._running = None
        self._ring()
        try:
            if failure is not None:  # only now: who logs may fail, too
                log.error("the background save of checkpoint %s failed", checkpoint_id, exc_info=failure)
        finally:
            _end_if_idle()
        if isinstance(failure, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise failure  # the caller does its save itself, and was interrupted

    def _wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until ``condition``, which is asked after every change, under the lock, holds; False at the timeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            bell: SimpleQueue[None] = SimpleQueue()
            with self._lock:
                if condition():
                    return True
                self._bells.append(bell)
            try:
                bell.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except Empty:
                with self._lock:
                    self._bells = [other for other in self._bells if other is not bell]
                return False

    def _ring(self) -> None:
        with self._lock:
            bells, self._bells = self._bells, []
        for bell in bells:
            bell.put(None)

    def wait(self, ids: Collection[str] | None = None, timeout: float | None = None) -> bool:
        """Wait until the saves ``ids`` (None: all that are pending now) have ended; returns whether they have.

        Within a background save, in one of its hooks, this returns at once: nothing can end meanwhile.
        """
        if not self.jobs or self.is_worker():
            return not self.jobs
        awaited = set(self.jobs if ids is None else ids)
        return self._wait_until(lambda: not awaited & self.jobs.keys(), timeout)

    def is_worker(self) -> bool:
        """Whether the caller is a hook of a background save, in the thread that saves or in one that it waits for."""
        return acting_thread() is self._worker

    def raise_failure(self, checkpoint_id: str | None = None) -> None:
        """Raise what became of a background save that failed, of the first one for None; each is raised once.

        Raises:
            SaveFailedError: with the failure as its ``__cause__``.
        """
        with self._lock:
            failed = next(iter(self.failures), None) if checkpoint_id is None else checkpoint_id
            failure = self.failures.pop(failed, None) if failed is not None else None
        if failed is not None and failure is not None:
            raise SaveFailedError(failed, failure) from failure


_queues: dict[int, ReferenceType[SaveQueue]] = {}
_numbers = count()
_watching = False  # whether the main thread has saved in the background, and SIGTERM has to wait for that
_ending = False  # whether SIGTERM came; a loop that goes on saving must not put the end off


def end_after_saves_at_sigterm() -> None:
    """Let SIGTERM end the process when nothing is pending any more, where it would have ended it at once.

    A program that has a handler of its own is left alone: it ends by way of the interpreter, which waits. Outside the
    main thread no handler can be set.
    """
    global _watching
    if threading.current_thread() is threading.main_thread():
        _watching = True
        if not _ending and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end_after_saves)


def default_handler(number: int) -> Any:
    """Return what stands for SIG_DFL of a signal in this process: for SIGTERM, ``end_after_saves`` once it was set."""
    return end_after_saves if number == signal.SIGTERM and _watching and not _ending else signal.SIG_DFL


def end_after_saves(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: the process ends by that signal, at once or as soon as its saves are durable."""
    global _ending
    _ending = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who cannot wait sends it again
    _end_if_idle()  # never wait here: the main thread may hold a lock that a save needs


def _all_queues() -> list[SaveQueue]:
    """Return the queues that there are; they come and go in other threads, and a copy of the dict is taken at once."""
    return [queue for reference in _queues.copy().values() if (queue := reference()) is not None]


def _only_saves_are_left() -> bool:
    """Whether the interpreter waits for nothing but us at its end: a daemon that goes on saving would put it off."""
    ours = [threading.main_thread(), *(queue._worker for queue in _all_queues())]
    return not threading.main_thread().is_alive() and all(t.daemon or t in ours for t in threading.enumerate())


def _end_if_idle() -> None:
    if _ending and not any(queue.jobs for queue in _all_queues()):
        os.kill(os.getpid(), signal.SIGTERM)
        if os.getpid() == _INIT:
            os._exit(128 + signal.SIGTERM)


def _in_child() -> None:
    global _ending, _watching
    _ending = _watching = False
    if signal.getsignal(signal.SIGTERM) is end_after_saves:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it has no saves


os.register_at_fork(after_in_child=_in_child)
