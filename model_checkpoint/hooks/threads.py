"""Threads for handlers that must not run in the caller's: with a timeout, and in the background.

All of them are daemons, so that a handler that never returns does not keep the process from ending.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

from model_checkpoint.errors import HookTimeoutError
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.parallel import start

log = logging.getLogger(__name__)
REST = 5.0  # seconds after which a thread that nobody needs ends
_AT_EXIT = 10.0  # seconds that the end of the process waits for handlers in the background
_LAST = 0.5  # seconds that whoever comes when these are over has
_ROOM = 1000  # handlers that may wait for a thread

acting_for: ContextVar[threading.Thread | None] = ContextVar("the thread that waits for this one", default=None)


def acting_thread() -> threading.Thread:
    """Return the thread whose call this is: for a handler that somebody waits for, the one that waits."""
    return acting_for.get() or threading.current_thread()


def taken_lock() -> threading.Lock:
    """Return a lock that somebody else is to release; waiting for it can be interrupted at any moment."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Call:
    """A call that another thread makes, in ``context``, or in a copy of this thread's."""

    def __init__(self, function: Callable[[], Any] | None = None, context: Context | None = None) -> None:
        self._function = function
        self._context = copy_context() if context is None else context
        self.done = taken_lock()
        self.value: Any = None
        self.error: BaseException | None = None

    def make(self) -> None:
        try:
            if self._function is not None:
                self.value = self._context.run(self._function)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.fail(error)
        finally:
            self._function = None  # what it holds must not live as long as the thread

    def fail(self, error: BaseException) -> None:
        """Note the error. A KeyboardInterrupt here is the handler's own: the user's goes to the main thread."""
        if isinstance(error, KeyboardInterrupt):
            wrapped = RuntimeError("the handler raised KeyboardInterrupt")
            wrapped.__cause__ = error
            error = wrapped
        self.error = error

    def result(self, timeout: float | None) -> Any:
        if timeout is None:
            self.done.acquire()
        elif not self.done.acquire(timeout=timeout):
            raise HookTimeoutError(timeout)
        error, self.error = self.error, None
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error  # or its traceback and this frame would keep each other, and the handler's arrays


class _Helper:
    """A thread that makes calls, one after the other, and ends when nobody needs it for a while."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Call] = SimpleQueue()

    def work(self) -> None:
        while True:
            try:
                call = self.calls.get(timeout=REST)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # somebody has taken it just now
                return
            call.make()
            _idle.append(self)  # before the caller goes on, who may need a thread at once
            call.done.release()
            del call


_idle: list[_Helper] = []


def _begin_elsewhere(function: Callable[[], Any], context: Context | None = None) -> Call | None:
    """Let another thread call ``function``; None where no thread can be started any more."""
    call = Call(function, context)
    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Helper()
        if not start(threading.Thread(target=helper.work, name="model-checkpoint-hook", daemon=True)):
            return None
    helper.calls.put(call)
    return call


def call_elsewhere(function: Callable[[], Any], timeout: float | None) -> Any:
    """Call ``function`` in another thread on behalf of this one, and return what it returns.

    Raises:
        HookTimeoutError: it takes longer than ``timeout`` seconds; it goes on, and what it returns is lost.
        BaseException: what it raises.
    """
    acting = acting_for.set(acting_thread())
    try:
        call = _begin_elsewhere(function)
    finally:
        acting_for.reset(acting)
    return function() if call is None else call.result(timeout)


class Pool:
    """Jobs done in the background, begun in their order.

    Args:
        threads: how many at once.
    """

    def __init__(self, threads: int) -> None:
        self._limit = threads
        self.after_fork_in_child()
        watch(self)
        _pools.add(self)

    def before_fork(self) -> None:
        """Nothing has to rest: the child starts without jobs."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Forget the jobs: they are the parent's."""
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque()
        self._running = 0
        self._workers: set[threading.Thread] = set()
        self._bells: list[threading.Lock] = []

    def submit(self, job: Callable[[], object]) -> bool:
        """Do ``job`` in the background; returns False where too many wait, and at the end of the interpreter does it.

        Args:
            job: raises nothing.
        """
        _finish_with_child()
        with self._lock:
            if len(self._waiting) >= _ROOM:
                return False
            self._waiting.append(job)
            if self._running >= self._limit:
                return True
            self._running += 1
        if _begin_elsewhere(self._work, Context()) is None:
            self._work()
        return True

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                self._workers.add(me)
                if not self._waiting:
                    self._workers.discard(me)
                    self._running -= 1
                    bells, self._bells = (self._bells, []) if not self._running else ([], self._bells)
                    break
                job = self._waiting.popleft()
            try:
                job()
            except BaseException:
                log.exception("a hook in the background failed")
            del job
        for bell in bells:
            bell.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; returns whether it came to that within ``timeout`` seconds.

        A job, or a thread that a job waits for, gets False at once: it would wait for itself.
        """
        bell = taken_lock()
        with self._lock:
            if not self._running:
                return True
            if acting_thread() in self._workers:
                return False
            self._bells.append(bell)
        came = bell.acquire(timeout=-1 if timeout is None else timeout)
        if not came:
            with self._lock:
                self._bells = [other for other in self._bells if other is not bell]
        return came


_pools: WeakSet[Pool] = WeakSet()


_end: float | None = None  # when the end of the process stops waiting
_child: int | None = None  # this process, if it is one of multiprocessing's, which goes through no exit handlers


@atexit.register
def finish() -> None:
    """Wait at the end of the process for what runs in the background: a message that a run has ended should get out.

    Whoever fires events at the exit calls this afterwards: the order of exit handlers is not in our hands.
    """
    global _end
    _end = _end or time.monotonic() + _AT_EXIT
    for pool in list(_pools):
        if not pool.wait(max(_LAST, _end - time.monotonic())):
            log.warning("hooks in the background took longer than %g s at the end of the process", _AT_EXIT)


def _finish_with_child() -> None:
    """Let the end of a multiprocessing child wait, too."""
    global _child
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and _child != os.getpid() and processes.parent_process() is not None:
        from multiprocessing.util import Finalize

        _child = os.getpid()
        Finalize(None, finish, exitpriority=0)


def _in_child() -> None:
    global _end
    _end = None
    _idle.clear()


os.register_at_fork(after_in_child=_in_child)
