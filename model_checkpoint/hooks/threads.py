"""Threads for handlers that must not run in the caller's: with a timeout, as coroutines, in the background.

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
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from model_checkpoint.errors import HookTimeoutError
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.parallel import start

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

log = logging.getLogger(__name__)
_REST = 5.0  # seconds after which a thread that nobody needs ends
_ANSWER = 0.25  # seconds that the event loop has to show that it still turns
_AT_EXIT = 10.0  # seconds that the end of the process waits for handlers in the background
_ROOM = 1000  # handlers that may wait for a thread

_in_coroutine: ContextVar[bool] = ContextVar("inside a coroutine of a hook", default=False)
_acting_for: ContextVar[threading.Thread | None] = ContextVar("the thread that waits for this one", default=None)


def acting_thread() -> threading.Thread:
    """Return the thread whose call this is: for a handler that somebody waits for, the one that waits."""
    return _acting_for.get() or threading.current_thread()


class _Call:
    """A call that another thread makes, in ``context``, or in a copy of this thread's."""

    def __init__(self, function: Callable[[], Any] | None = None, context: Context | None = None) -> None:
        self._function = function
        self._context = copy_context() if context is None else context
        self.done = _taken_lock()
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
        self.calls: SimpleQueue[_Call] = SimpleQueue()

    def work(self) -> None:
        while True:
            try:
                call = self.calls.get(timeout=_REST)
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


def _begin_elsewhere(function: Callable[[], Any], context: Context | None = None) -> _Call | None:
    """Let another thread call ``function``; None where no thread can be started any more."""
    call = _Call(function, context)
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
    acting = _acting_for.set(acting_thread())
    try:
        call = _begin_elsewhere(function)
    finally:
        _acting_for.reset(acting)
    return function() if call is None else call.result(timeout)


class _BlockedError(Exception):
    """Another coroutine blocks the event loop; the one that was to run has not begun, and will not."""


class _Loop:
    """The event loop of hooks and its thread."""

    def __init__(self) -> None:
        import asyncio  # 50 ms, which who has no such handlers does not pay

        self.loop: AbstractEventLoop = asyncio.new_event_loop()
        self._left = False
        self._active = 0  # coroutines that have begun and not ended; changed by the loop's thread only
        self.thread = threading.Thread(target=self._turn, name="model-checkpoint-hook-loop", daemon=True)

    def _turn(self) -> None:
        while not (self._left and not self._active):
            try:
                self.loop.run_forever()
            except BaseException:  # a SystemExit of a task that a handler has made
                log.exception("a task that a hook has started ended the event loop of hooks; it goes on")
        self.loop.close()

    def leave(self) -> None:
        """Let it end as soon as nothing that has begun here goes on."""
        self._left = True
        self.loop.call_soon_threadsafe(self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self._left and not self._active:
            self.loop.stop()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Run a coroutine to its end, and return what it returns.

        Raises:
            _BlockedError: another one blocks the loop.
            HookTimeoutError, BaseException: as ``call_elsewhere``.
        """
        call, tasks = _Call(), []
        permit = [None]  # whoever takes it first decides: the loop, which begins, or we, who give up
        begun = _taken_lock()

        async def main() -> None:
            _in_coroutine.set(True)
            try:
                call.value = await coroutine
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                call.fail(error)
            finally:
                call.done.release()
                self._active -= 1
                self._end_if_idle()

        def begin() -> None:
            if _take(permit):
                self._active += 1
                tasks.append(self.loop.create_task(main()))
                begun.release()

        acting = _acting_for.set(acting_thread())
        try:
            self.loop.call_soon_threadsafe(begin, context=copy_context())
        finally:
            _acting_for.reset(acting)
        try:
            if not begun.acquire(timeout=_ANSWER) and _take(permit):
                raise _BlockedError
            return call.result(timeout)
        except (HookTimeoutError, KeyboardInterrupt):
            self.loop.call_soon_threadsafe(_cancel, tasks)
            raise

    def turns(self) -> bool:
        """Whether it answers; a coroutine that blocks keeps it from that."""
        answered = _taken_lock()
        self.loop.call_soon_threadsafe(answered.release)
        return answered.acquire(timeout=_ANSWER)


def _taken_lock() -> threading.Lock:
    """Return a lock that somebody else is to release; waiting for it can be interrupted at any moment."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _take(permit: list[None]) -> bool:
    """Return whether this is the first call for ``permit``."""
    try:
        permit.pop()
    except IndexError:
        return False
    return True


def _cancel(tasks: list[Task[None]]) -> None:
    for task in tasks:
        task.cancel()


_loop: _Loop | None = None
_starting = threading.Lock()


def await_elsewhere(coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
    """Run a coroutine on the event loop of hooks, and return what it returns; raises as ``call_elsewhere``."""
    global _loop
    with _starting:
        if _loop is None:
            made = _Loop()
            _loop = made if start(made.thread) else None
        loop = _loop
    if loop is None or _in_coroutine.get():  # a coroutine that fires an event itself has the loop for that long
        import asyncio

        return call_elsewhere(partial(asyncio.run, coroutine), timeout)
    try:
        return loop.run(coroutine, timeout)
    except _BlockedError:
        _leave(loop)
    except HookTimeoutError:
        if not loop.turns():
            _leave(loop)
        raise
    return await_elsewhere(coroutine, timeout)


def _leave(loop: _Loop) -> None:
    """Let the next coroutine have a new loop."""
    global _loop
    with _starting:
        mine = _loop is loop
        _loop = None if mine else _loop
    if mine:
        loop.leave()


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
        bell = _taken_lock()
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
        if not pool.wait(max(0.0, _end - time.monotonic())):
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
    global _loop, _starting, _end
    _loop, _starting, _end = None, threading.Lock(), None
    _idle.clear()


os.register_at_fork(after_in_child=_in_child)
