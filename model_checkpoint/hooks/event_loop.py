"""The event loop that coroutines of hooks run on, in a thread of its own, and what becomes of one that is blocked."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from model_checkpoint.errors import HookTimeoutError
from model_checkpoint.hooks.threads import REST, Call, acting_for, acting_thread, call_elsewhere, taken_lock
from model_checkpoint.utils.parallel import start

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

log = logging.getLogger(__name__)
_ANSWER = 0.25  # seconds that the event loop has to show that it still turns
_in_coroutine: ContextVar[bool] = ContextVar("inside a coroutine of a hook", default=False)


class _BlockedError(Exception):
    """Another coroutine blocks the event loop; the one that was to run has not begun, and will not."""


class _Loop:
    """The event loop of hooks and its thread."""

    def __init__(self) -> None:
        import asyncio  # 50 ms, which who has no such handlers does not pay

        self.loop: AbstractEventLoop = asyncio.new_event_loop()
        self._left = False
        self._tasks = partial(asyncio.all_tasks, self.loop)  # that have begun and not ended
        self.thread = threading.Thread(target=self._turn, name="model-checkpoint-hook-loop", daemon=True)

    def _turn(self) -> None:
        while not self._left or self._tasks():
            try:
                self.loop.run_forever()
            except BaseException:  # a SystemExit of a task that a handler has made
                log.exception("a task that a hook has started ended the event loop of hooks; it goes on")
        self.loop.close()

    def leave(self) -> None:
        """Let it end as soon as nothing that has begun here goes on."""
        self._left = True
        with suppress(RuntimeError):  # it has ended already
            self.loop.call_soon_threadsafe(self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self._tasks():
            self.loop.call_later(REST / 10, self._end_if_idle)
        else:
            self.loop.stop()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Run a coroutine to its end, and return what it returns.

        Raises:
            _BlockedError: another one blocks the loop.
            HookTimeoutError, BaseException: as ``call_elsewhere``.
        """
        call, tasks = Call(), []
        permit = [None]  # whoever takes it first decides: the loop, which begins, or we, who give up
        begun = taken_lock()

        async def main() -> None:
            _in_coroutine.set(True)
            try:
                call.value = await coroutine
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                call.fail(error)
            finally:
                call.done.release()

        def begin() -> None:
            if _take(permit):
                tasks.append(self.loop.create_task(main()))
                begun.release()

        acting = acting_for.set(acting_thread())
        try:
            self.loop.call_soon_threadsafe(begin, context=copy_context())
        except RuntimeError:
            raise _BlockedError from None  # it has just been left, and has ended
        finally:
            acting_for.reset(acting)
        try:
            if not begun.acquire(timeout=_ANSWER) and _take(permit):
                raise _BlockedError
            return call.result(timeout)
        except (HookTimeoutError, KeyboardInterrupt):
            if not _take(permit):  # it has begun
                with suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(_cancel, tasks)
            raise

    def turns(self) -> bool:
        """Whether it answers; a coroutine that blocks keeps it from that."""
        answered = taken_lock()
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(answered.release)
        return answered.acquire(timeout=_ANSWER)


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


def _in_child() -> None:
    global _loop, _starting
    _loop, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_in_child)
