"""Registering hooks and running them. A failing hook never changes the outcome of what it watches."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model_checkpoint.errors import HookRegistrationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority, HookResult
from model_checkpoint.utils.fork import renew_in_child
from model_checkpoint.utils.jsonable import scalar

log = logging.getLogger(__name__)
Handler = Callable[[HookContext], Any]
ErrorHandler = Callable[[BaseException, HookContext], Any]
_NOT_YET = {"timeout", "async_execution"}  # of the first design; as metadata they would be ignored without a word


@dataclass
class _Hook:
    name: str
    handler: Handler
    events: tuple[HookEvent, ...]
    priority: int
    error_handler: ErrorHandler | None
    metadata: dict[str, Any]
    enabled: bool = True
    calls: int = 0
    failures: int = 0
    times: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "min": float("inf"), "max": 0.0})


class HookManager:
    """The hooks of one checkpoint manager; safe to use from many threads, also from within a hook.

    Attributes:
        listening: event -> its hooks in the order in which they run; an event without hooks is not in it.
    """

    def __init__(self) -> None:
        self.listening: dict[HookEvent, tuple[_Hook, ...]] = {}
        self._hooks: dict[str, _Hook] = {}
        self._lock = threading.RLock()
        renew_in_child(self, "_lock", threading.RLock)

    def register_hook(
        self,
        name: str | BaseHook,
        handler: Handler | None = None,
        events: Iterable[HookEvent | str] | None = None,
        priority: int = HookPriority.NORMAL,
        error_handler: ErrorHandler | None = None,
        **metadata: Any,
    ) -> None:
        """Register a function, or a hook object, which brings its own name, events and priority.

        Args:
            name: unique text, or a ``BaseHook``.
            handler: called with a ``HookContext``; see ``BaseHook.execute`` for what it may return.
            events: when it runs: ``HookEvent`` members or their values.
            priority: the lower runs first; within one priority, the order of registration.
            error_handler: called with the exception and the context when the handler fails.
            **metadata: handed to the handler as ``context.metadata``.

        Raises:
            HookRegistrationError: a name that is taken, a handler that cannot be called with one argument, an unknown
                event; the text names the hook and the argument.
        """
        if isinstance(name, BaseHook):
            hook = name
            if not hasattr(hook, "name"):
                raise HookRegistrationError(f"hook {type(hook).__name__}: its __init__ must call super().__init__()")
            if handler is not None or events is not None:
                raise HookRegistrationError(f"hook {hook.name!r}: a hook object brings its own handler and events")
            name, handler, events, priority = hook.name, hook.execute, hook.events, hook.priority
        if not isinstance(name, str):
            raise HookRegistrationError(f"hook {name!r}: name must be text or an instance of BaseHook")
        unknown = sorted(metadata.keys() & _NOT_YET)
        if unknown:
            raise HookRegistrationError(f"hook {name!r}: {unknown[0]} is not supported; handlers run in the caller")
        if error_handler is not None and not callable(error_handler):
            raise HookRegistrationError(f"hook {name!r}: error_handler must be callable, not {error_handler!r}")
        if not isinstance(priority, int):
            raise HookRegistrationError(f"hook {name!r}: priority must be an integer, not {priority!r}")
        made = _Hook(
            name, _check_handler(name, handler), _check_events(name, events), int(priority), error_handler, metadata
        )
        with self._lock:
            if name in self._hooks:
                raise HookRegistrationError(f"hook {name!r}: the name is taken; unregister that hook or choose another")
            self._hooks[name] = made
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
            if name in self._hooks:
                self._hooks[name].enabled = enabled
                self._order()
            return name in self._hooks

    def _order(self) -> None:
        ordered = sorted((h for h in self._hooks.values() if h.enabled), key=lambda h: h.priority)  # stable
        made: dict[HookEvent, tuple[_Hook, ...]] = {}
        for hook in ordered:
            for event in hook.events:
                made[event] = (*made.get(event, ()), hook)
        self.listening = made  # replaced whole, so that a firing under way keeps the one it started with

    def fire_hook(
        self,
        event: HookEvent | str,
        context: HookContext | None = None,
        data: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> HookResult:
        """Run the hooks of ``event`` in the calling thread, in their order, until one vetoes.

        Args:
            event: what happens, a ``HookEvent`` or its value.
            context: handed to the handlers; made from the other arguments when None.
            data: the context's data.
            **more: ``checkpoint_id`` and ``experiment_id`` of the context; anything else is added to its data.

        Returns:
            What came of it. A handler's exception is in ``errors``, logged, and goes no further.
        """
        result = HookResult()
        event = HookEvent(event)
        hooks = self.listening.get(event, ())
        if not hooks:
            return result
        if context is None:
            ids = {key: more.pop(key, None) for key in ("checkpoint_id", "experiment_id")}
            context = HookContext(event, {**(data or {}), **more}, **ids)
        for hook in hooks:
            if not _run(hook, context, result):
                result.success = False
                break
        return result

    def list_hooks(self, event: HookEvent | None = None) -> list[dict[str, Any]]:
        """Return name, events, priority, enabled, calls, failures and metadata of the hooks, of one event or all."""
        with self._lock:
            chosen = [h for h in self._hooks.values() if event is None or event in h.events]
            return [
                {
                    "name": hook.name,
                    "events": [e.value for e in hook.events],
                    "priority": hook.priority,
                    "enabled": hook.enabled,
                    "calls": hook.calls,
                    "failures": hook.failures,
                    "metadata": dict(hook.metadata),
                }
                for hook in sorted(chosen, key=lambda h: h.priority)
            ]

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
                return {each: _stats(hook) for each, hook in self._hooks.items()}
            if name not in self._hooks:
                raise HookRegistrationError(f"hook {name!r} is not registered; list_hooks() shows those that are")
            return _stats(self._hooks[name])


def _run(hook: _Hook, context: HookContext, result: HookResult) -> bool:
    context.metadata = dict(hook.metadata)
    start = time.perf_counter()
    hook.calls += 1
    try:
        returned = hook.handler(context)
        if inspect.iscoroutine(returned):
            returned.close()
            raise TypeError("the handler returned a coroutine, which nobody awaits; make it a plain function")
    except KeyboardInterrupt:
        raise  # the user's, not the hook's
    except BaseException as error:
        hook.failures += 1
        result.success = False
        result.errors[hook.name] = error
        log.exception("hook %r failed at %s; what it watches goes on", hook.name, context.event.value)
        _tell(hook, error, context)
        return True
    finally:
        spent = time.perf_counter() - start
        times = hook.times
        times.update(total=times["total"] + spent, min=min(times["min"], spent), max=max(times["max"], spent))
    result.results[hook.name] = returned
    vetoed = _is_false(returned.get("continue") if isinstance(returned, dict) else returned)
    if vetoed and context.event.can_be_vetoed:
        result.stopped_by = hook.name
        result.reason = returned.get("reason") if isinstance(returned, dict) else None
        return False
    return True


def _is_false(value: Any) -> bool:
    """Whether ``value`` is False, NumPy's and torch's included; 0, an empty list and the like are results."""
    found = scalar(value) if value is not None and not isinstance(value, bool) else value
    return found is False


def _tell(hook: _Hook, error: BaseException, context: HookContext) -> None:
    if hook.error_handler is None:
        return
    try:
        hook.error_handler(error, context)
    except Exception:
        log.exception("the error handler of hook %r failed too", hook.name)


def _stats(hook: _Hook) -> dict[str, Any]:
    return {
        "total_calls": hook.calls,
        "successful_calls": hook.calls - hook.failures,
        "failed_calls": hook.failures,
        "min_time": hook.times["min"] if hook.calls else 0.0,
        "avg_time": hook.times["total"] / hook.calls if hook.calls else 0.0,
        "max_time": hook.times["max"],
    }


def _check_events(name: str, events: Iterable[HookEvent | str] | None) -> tuple[HookEvent, ...]:
    if not isinstance(events, Iterable) or isinstance(events, str):
        raise HookRegistrationError(f"hook {name!r}: events must be a list of HookEvent, not {events!r}")
    try:
        known = tuple(dict.fromkeys(HookEvent(event) for event in events))
    except ValueError as error:
        names = ", ".join(e.name for e in HookEvent)
        raise HookRegistrationError(f"hook {name!r}: events has an unknown one ({error}); known: {names}") from None
    if not known:
        raise HookRegistrationError(f"hook {name!r}: events is empty, it would never run")
    return known


def _check_handler(name: str, handler: Handler | None) -> Handler:
    if not callable(handler) or isinstance(handler, type):
        raise HookRegistrationError(f"hook {name!r}: handler must be a function or callable object, not {handler!r}")
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__):
        raise HookRegistrationError(f"hook {name!r}: handler must be a plain function, not async")
    try:
        inspect.signature(handler).bind(None)
    except TypeError as error:
        raise HookRegistrationError(f"hook {name!r}: handler must take one argument, the context ({error})") from None
    except ValueError:
        pass  # a builtin without a signature: nothing to check
    return handler
