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
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar
from weakref import WeakSet

from model_checkpoint.checkpoint.snapshot import SnapshotBuffer
from model_checkpoint.errors import SaveFailedError
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.parallel import start

log = logging.getLogger(__name__)
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
        _queues.add(self)

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
        if len(self.jobs) >= self._limit or (ending and not any(queue.is_worker() for queue in list(_queues))):
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
            while self._wait_until(self._take_job) and self._running is not None:
                self._do(self._running)
        finally:
            with self._lock:
                died = self._worker is threading.current_thread()  # it is None where all is done
                if died:
                    self._worker = None
            if died and self.jobs and not self._start():
                self._work()  # those who wait must not wait for ever

    def _start(self) -> bool:
        return start(threading.Thread(target=self._work, name="checkpoint saves", daemon=False))

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

    def _take_job(self) -> bool:
        """Note the first job as running, or that there is none; returns False while its snapshot is taken."""
        first = next(iter(self.jobs), None)
        if first is not None and self.jobs[first] is None:
            return False
        self._running = first
        if first is None:
            self._worker = None
        return True

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
        """Whether the caller is a hook of a background save."""
        return threading.current_thread() is self._worker

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


_queues: WeakSet[SaveQueue] = WeakSet()
_ending = False  # whether SIGTERM came; a loop that goes on saving must not put the end off


def end_after_saves_at_sigterm() -> None:
    """Let SIGTERM end the process when nothing is pending any more, where it would have ended it at once.

    A program that has a handler of its own is left alone: it ends by way of the interpreter, which waits. Outside the
    main thread no handler can be set.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and not _ending and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_after_saves)


def end_after_saves(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: the process ends by that signal, at once or as soon as its saves are durable."""
    global _ending
    _ending = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who cannot wait sends it again
    _end_if_idle()  # never wait here: the main thread may hold a lock that a save needs


def _end_if_idle() -> None:
    if _ending and not any(queue.jobs for queue in list(_queues)):
        os.kill(os.getpid(), signal.SIGTERM)


def _in_child() -> None:
    global _ending
    _ending = False
    if signal.getsignal(signal.SIGTERM) is end_after_saves:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it has no saves


os.register_at_fork(after_in_child=_in_child)
