"""Registering hooks and running them. A failing hook never changes the outcome of what it watches."""

from __future__ import annotations

import inspect
import logging
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from model_checkpoint.errors import ConfigurationError, HookRegistrationError, HookTimeoutError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority, HookResult
from model_checkpoint.hooks.event_loop import await_elsewhere
from model_checkpoint.hooks.outcomes import (
    copied,
    forget_frames,
    interrupt_of,
    is_veto,
    mend,
    text_of,
    users_interrupt,
)
from model_checkpoint.hooks.registration import ErrorHandler, Handler, Hook, Options, event_of, hook_of, is_async
from model_checkpoint.hooks.threads import Pool, call_elsewhere
from model_checkpoint.utils.checks import check_count
from model_checkpoint.utils.fork import renew_in_child

log = logging.getLogger(__name__)
_MOST_TIMEOUTS = 3  # in a row, after which a hook is disabled: each may have left a thread that never ends

_REPORTS = frozenset({HookEvent.ON_ERROR, HookEvent.ON_DATABASE_ERROR})

_inside: ContextVar[bool] = ContextVar("inside a hook", default=False)
# The errors that handlers are being told of: what goes wrong in them meanwhile is not told, or it would never end.
_reporting: ContextVar[frozenset[HookEvent]] = ContextVar("reports under way", default=frozenset())


def inside_hook() -> bool:
    """Whether this is called by a handler, in whatever thread that runs."""
    return _inside.get()


@contextmanager
def as_hook() -> Iterator[None]:
    """Let ``inside_hook`` be true in a block."""
    inside = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(inside)


class HookManager:
    """The hooks of one run: of its tracker and its checkpoint manager. Any thread may use it, also from within a hook.

    Args:
        max_workers: how many handlers with ``async_execution`` run at once.
        enable_async: whether there may be handlers that run outside the caller's thread: coroutines and
            ``async_execution``.

    Attributes:
        listening: event -> its hooks in the order in which they run; an event without hooks is not in it.

    Raises:
        ConfigurationError: ``max_workers`` is no integer of at least 1.
    """

    def __init__(self, max_workers: int = 4, enable_async: bool = True) -> None:
        check_count(max_workers=max_workers)
        self.listening: dict[HookEvent, tuple[Hook, ...]] = {}
        self._hooks: dict[str, Hook] = {}
        self._pool = Pool(max_workers)
        self._later = Pool(1)
        self._has_pool = enable_async
        self._lock = threading.RLock()
        renew_in_child(self, "_lock", threading.RLock)

    def register_hook(
        self,
        name: str | BaseHook | Handler,
        handler: Handler | None = None,
        events: Iterable[HookEvent | str] | None = None,
        priority: int = HookPriority.NORMAL,
        timeout: float | None = None,
        async_execution: bool = False,
        error_handler: ErrorHandler | None = None,
        **metadata: Any,
    ) -> None:
        """Register a hook.

        A plain handler runs in the thread in which the event happens. An ``async def`` handler runs on an event loop of
        the engine's, and one with a timeout in another thread; the event waits for both, in their order. A handler with
        ``async_execution`` runs in the background: the event goes on, and can neither be vetoed nor learn the result.

        Args:
            name: unique text; or, alone, a ``BaseHook``, a function decorated with ``hook_handler``, or the name of a
                hook that an installed package brings (entry points ``model_checkpoint.hooks``).
            handler: called with a ``HookContext``; see ``BaseHook.execute`` for what it may return.
            events: when it runs: ``HookEvent`` members or their values.
            priority: the lower runs first; within one priority, the order of registration.
            timeout: seconds that the handler may take. Then it has failed, and nobody waits for it any more; after
                three times in a row the hook is disabled. The thread in which it goes on cannot be stopped; a coroutine
                is cancelled. None waits for as long as it takes.
            async_execution: whether it runs in the background.
            error_handler: called with the exception and the context when the handler fails.
            **metadata: handed to the handler as ``context.metadata``.

        Raises:
            HookRegistrationError: a name that is taken, a handler that cannot be called with one argument, an unknown
                event; the text names the hook and the argument.
        """
        options = Options(priority, timeout, async_execution, error_handler, metadata)
        made = hook_of(name, handler, events, options, self._has_pool)
        with self._lock:
            if made.name in self._hooks:
                raise HookRegistrationError(
                    f"hook {made.name!r}: the name is taken; unregister that hook or choose another"
                )
            self._hooks[made.name] = made
            self._order()

    def unregister_hook(self, name: str) -> bool:
        """Forget a hook; returns whether it was there. A firing that is under way still runs it."""
        with self._lock:
            found = self._hooks.pop(name, None) is not None
            self._order()
            return found

    def enable_hook(self, name: str) -> bool:
        """Let a disabled hook run again; returns whether it is there."""
        return self._set_enabled(name, True)

    def disable_hook(self, name: str) -> bool:
        """Keep a hook registered without running it; returns whether it is there."""
        return self._set_enabled(name, False)

    def _set_enabled(self, name: str, enabled: bool) -> bool:
        with self._lock:
            hook = self._hooks.get(name)
            if hook is not None:
                hook.enabled, hook.timeouts, hook.silenced = enabled, 0, False
                self._order()
            return hook is not None

    def _order(self) -> None:
        ordered = sorted((h for h in self._hooks.values() if h.enabled), key=lambda h: h.options.priority)  # stable
        made: dict[HookEvent, tuple[Hook, ...]] = {}
        for hook in ordered:
            for event in hook.handlers:
                made[event] = (*made.get(event, ()), hook)
        self.listening = made  # replaced whole, so that a firing under way keeps the one it started with

    def fire_hook(
        self,
        event: HookEvent | str,
        context: HookContext | None = None,
        data: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> HookResult:
        """Run the hooks of ``event`` in their order, until one vetoes.

        Args:
            event: what happens, a ``HookEvent`` or its value.
            context: handed to the handlers; made from the other arguments when None.
            data: the context's data.
            **more: ``checkpoint_id`` and ``experiment_id`` of the context; anything else is added to its data.

        Returns:
            What came of it. A handler's exception is in ``errors``, logged, and goes no further.

        Raises:
            KeyboardInterrupt, SystemExit: the user pressed Ctrl-C, or a signal handler ended the program, while a
                handler ran in the main thread; the handlers after it have run.
            ConfigurationError: there is no such event, or ``context`` is something else.
        """
        if type(event) is not HookEvent:
            event = event_of(event)
        if event not in self.listening:
            return HookResult()
        if context is None:
            ids = {key: more.pop(key, None) for key in ("checkpoint_id", "experiment_id")}
            context = HookContext(event, {**(data or {}), **more}, **ids)
        elif not isinstance(context, HookContext):
            raise ConfigurationError(f"fire_hook: context must be a HookContext, not {context!r:.200}; use data=...")
        result = (self._run_report if event in _REPORTS else self.run_hooks)(event, context)
        interrupt = interrupt_of(result) if result.errors else None
        if interrupt is not None:
            raise interrupt
        return result

    def run_hooks(self, event: HookEvent, context: HookContext) -> HookResult:
        """Run the hooks of ``event`` as ``fire_hook`` does, but raise nothing: see ``interrupt_of``."""
        result = HookResult()
        inside = _inside.set(True)
        try:
            for hook in self.listening.get(event, ()):
                mend(context, event)  # whatever the one before did to it
                if hook.options.async_execution:
                    self._run_in_background(hook, event, copied(context))
                    continue
                spare = None if hook.options.timeout is None else copied(context)
                try:
                    self._run(hook, event, context, result)
                except BaseException as error:  # from what it returned or raised: objects that are broken themselves
                    result.success = False
                    result.errors[hook.name] = error
                    hook.failures += 1
                    log.exception("hook %r failed at %s in a strange way", hook.name, event.value)
                if spare is not None and isinstance(result.errors.get(hook.name), HookTimeoutError):
                    context = spare  # the late one may go on, and change what it was given
                if result.stopped_by is not None:
                    result.success = False
                    break
        finally:
            _inside.reset(inside)
        return result

    def fire_later(self, event: HookEvent, data: Mapping[str, Any], experiment_id: str | None = None) -> None:
        """Run the hooks of ``event`` in a thread for that, where the caller must not wait or holds locks.

        Events that come this way stay in their order. Where handlers are slower than their events, those of which a
        thousand wait are dropped with a warning.
        """
        if event not in self.listening or event in _reporting.get():
            return
        context = HookContext(event, dict(data), None, experiment_id)
        if not self._later.submit(partial(self._run_report, event, context)):
            log.warning("%s: its hooks are slower than the events; one was dropped", event.value)

    def _run_report(self, event: HookEvent, context: HookContext) -> HookResult:
        reporting = _reporting.set(_reporting.get() | {event})
        try:
            return self.run_hooks(event, context)
        finally:
            _reporting.reset(reporting)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no handler runs in the background; returns whether it came to that within ``timeout`` seconds.

        A handler that runs there itself gets False at once.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._later.wait(timeout) and self._pool.wait(
            None if deadline is None else max(0.0, deadline - time.monotonic())
        )

    def _run_in_background(self, hook: Hook, event: HookEvent, context: HookContext) -> None:
        reported = _reporting.get()

        def job() -> None:
            _inside.set(True)
            _reporting.set(reported)
            self._run(hook, event, context, HookResult())

        if not self._pool.submit(job):
            hook.calls += 1
            hook.failures += 1
            log.error("hook %r: not run at %s, as too many wait for a thread", hook.name, event.value)

    def _run(self, hook: Hook, event: HookEvent, context: HookContext, result: HookResult) -> None:
        context.metadata = dict(hook.options.metadata)
        start = time.perf_counter()
        hook.calls += 1
        try:
            returned = self._call(hook.handlers[event], context, hook.options.timeout)
            vetoed = returned is not None and returned is not True and event.can_be_vetoed and is_veto(returned)
        except BaseException as error:  # noqa: BLE001 - reported below
            failure: BaseException | None = error
        else:
            failure, hook.timeouts = None, 0
        spent = time.perf_counter() - start
        hook.total += spent
        hook.shortest = spent if spent < hook.shortest else hook.shortest
        hook.longest = spent if spent > hook.longest else hook.longest
        if failure is not None:
            result.success = False
            result.errors[hook.name] = failure
            result.errors[hook.name] = self._report(hook, event, failure, context)
            forget_frames(failure)
            return
        result.results[hook.name] = returned
        if vetoed:
            result.stopped_by = hook.name
            result.reason = returned.get("reason") if isinstance(returned, dict) else None

    def _call(self, handler: Handler, context: HookContext, timeout: float | None) -> Any:
        """Call a handler where it belongs, and return what it returns."""
        if timeout is not None and not is_async(handler):
            returned = call_elsewhere(partial(handler, context), timeout)
        else:
            returned = handler(context)
        if not inspect.iscoroutine(returned):
            return returned
        if not self._has_pool:
            returned.close()
            raise TypeError("the handler returned a coroutine, and this manager has enable_async=False")
        return await_elsewhere(returned, timeout)

    def _report(self, hook: Hook, event: HookEvent, error: BaseException, context: HookContext) -> BaseException:
        """Log the failure once, count it, and tell whom the hook names and who listens to ON_ERROR.

        Returns:
            It, or the user's interrupt that came meanwhile.
        """
        hook.failures += 1
        if users_interrupt(error) is None:
            text = "hook %r failed at %s; what it watches goes on"
            log.error(text, hook.name, event.value, exc_info=error)
        hook.timeouts = hook.timeouts + 1 if isinstance(error, HookTimeoutError) else 0
        if hook.timeouts >= _MOST_TIMEOUTS:
            text = "hook %r is disabled: it took too long %d times in a row; enable_hook(%r) lets it run again"
            log.error(text, hook.name, hook.timeouts, hook.name)
            self.disable_hook(hook.name)
            hook.silenced = True
        if hook.options.error_handler is not None:
            try:
                hook.options.error_handler(error, context)
            except BaseException as worse:
                log.exception("the error handler of hook %r failed too", hook.name)
                error = users_interrupt(worse) or error
        interrupt = self.report_error("hook", error, context.experiment_id, hook.name, event.value)
        return interrupt or error

    def report_error(
        self,
        source: str,
        error: BaseException,
        experiment_id: str | None,
        hook: str | None = None,
        event: str | None = None,
    ) -> BaseException | None:
        """Fire ON_ERROR for an error that goes no further; one within a handler of ON_ERROR is only logged.

        Args:
            source: what failed.
            error: how.
            experiment_id: whose.
            hook, event: whose it is, and at which event, of a hook's.

        Returns:
            The user's interrupt that came meanwhile, or None.
        """
        if HookEvent.ON_ERROR not in self.listening or HookEvent.ON_ERROR in _reporting.get():
            return None
        told = {"source": source, "error_type": type(error).__name__, "hook": hook, "event": event}
        told["traceback"] = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        told["error"] = text_of(error)
        return interrupt_of(
            self._run_report(HookEvent.ON_ERROR, HookContext(HookEvent.ON_ERROR, told, None, experiment_id))
        )

    def silenced(self, event: HookEvent) -> list[str]:
        """Return the hooks of an event that were disabled because they took too long."""
        return [hook.name for hook in self._hooks.copy().values() if hook.silenced and event in hook.handlers]

    def list_hooks(self, event: HookEvent | None = None) -> list[dict[str, Any]]:
        """Return what is registered, of one event or all, in the order in which it runs.

        Returns:
            Dicts with ``name``, ``events``, ``priority``, ``timeout``, ``async_execution``, ``enabled``, ``calls``,
            ``failures`` and ``metadata``.
        """
        with self._lock:
            chosen = [h for h in self._hooks.values() if event is None or event in h.handlers]
            return [hook.described() for hook in sorted(chosen, key=lambda h: h.options.priority)]

    def get_performance_stats(self, name: str | None = None) -> dict[str, Any]:
        """Return the statistics of one hook, or hook name -> statistics.

        Returns:
            ``total_calls``, ``successful_calls``, ``failed_calls``,
            and in seconds ``min_time``, ``avg_time``, ``max_time``.

        Raises:
            HookRegistrationError: no hook has that name.
        """
        with self._lock:
            if name is None:
                return {each: hook.stats() for each, hook in self._hooks.items()}
            if name not in self._hooks:
                raise HookRegistrationError(f"hook {name!r} is not registered; list_hooks() shows those that are")
            return self._hooks[name].stats()
