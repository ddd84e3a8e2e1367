"""Decorators for handlers, plain and ``async def`` ones; those that change how a handler runs may be stacked."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from model_checkpoint.errors import HookRegistrationError
from model_checkpoint.hooks.base_hook import HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.registration import MARK, ErrorHandler, Handler, Marked, Options, is_async

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])
# What a decorator does with the context, a way to call the handler, and one to sleep.
_Course = Callable[
    [HookContext, Callable[[], Awaitable[Any]], Callable[[float], Awaitable[None]]], Coroutine[Any, Any, Any]
]
_Events = HookEvent | str | Iterable["HookEvent | str"]


def hook_handler(
    events: _Events,
    *,
    name: str | None = None,
    priority: int = HookPriority.NORMAL,
    timeout: float | None = None,
    async_execution: bool = False,
    error_handler: ErrorHandler | None = None,
    **metadata: Any,
) -> Callable[[Function], Function]:
    """Note on a function when and how it is to run, for ``register_hook(function)``; it stays what it is.

    Args:
        events: an event or several.
        name: the hook's; the function's own when None.
        priority, timeout, async_execution, error_handler, **metadata: see ``HookManager.register_hook``.
    """
    options = Options(priority, timeout, async_execution, error_handler, metadata)

    def mark(function: Function) -> Function:
        chosen = [events] if isinstance(events, str) else events  # an event is a text, too
        setattr(function, MARK, Marked(name or function.__name__, chosen, options))
        return function

    return mark


def async_hook_handler(events: _Events, **options: Any) -> Callable[[Function], Function]:
    """Do what ``hook_handler`` does, with ``async_execution=True``: the event does not wait for the function."""
    return hook_handler(events, async_execution=True, **options)


def conditional_hook(condition: Callable[[HookContext], Any]) -> Callable[[Handler], Handler]:
    """Let the handler run only where ``condition(context)`` is true; elsewhere it returns None."""

    async def course(context: HookContext, call: Callable[[], Awaitable[Any]], sleep: object) -> Any:
        return await call() if condition(context) else None

    return _around(course)


def retry_on_failure(
    times: int = 3,
    delay: float = 0.1,
    backoff: float = 2.0,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Callable[[Handler], Handler]:
    """Call the handler again when it fails.

    Args:
        times: how often at most in all, from 1; what the last call raises is the failure.
        delay: seconds before the second call. Where the event waits for the handler, it waits for these, too.
        backoff: what the delay grows by each time, as a factor.
        errors: which exceptions.

    Raises:
        HookRegistrationError: ``times`` is no such number.
    """
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise HookRegistrationError(f"retry_on_failure: times must be an integer of at least 1, not {times!r}")

    async def course(
        context: HookContext, call: Callable[[], Awaitable[Any]], sleep: Callable[[float], Awaitable[None]]
    ) -> Any:
        for attempt in range(times - 1):
            try:
                return await call()
            except errors as error:
                log.warning("a hook failed at %s, call %d of %d: %r", context.event.value, attempt + 1, times, error)
            await sleep(delay * backoff**attempt)
        return await call()

    return _around(course)


def benchmark_hook(function: Handler) -> Handler:
    """Measure the handler: the newest 1,000 times, in seconds, are in its attribute ``seconds``; each is logged."""
    seconds: deque[float] = deque(maxlen=1000)
    name = getattr(function, "__name__", repr(function))

    async def course(context: HookContext, call: Callable[[], Awaitable[Any]], sleep: object) -> Any:
        start = time.perf_counter()
        try:
            return await call()
        finally:
            seconds.append(time.perf_counter() - start)
            log.info("hook handler %s took %.3g s at %s", name, seconds[-1], context.event.value)

    wrapped = _around(course)(function)
    wrapped.seconds = seconds  # type: ignore[attr-defined]
    return wrapped


def suppress_errors(*errors: type[Exception], default: Any = None) -> Callable[[Handler], Handler]:
    """Let the handler return ``default`` where it raises one of ``errors`` (any Exception when none is given).

    That is a success; the error is only logged, as a warning.
    """

    suppressed = errors or (Exception,)

    async def course(context: HookContext, call: Callable[[], Awaitable[Any]], sleep: object) -> Any:
        try:
            return await call()
        except suppressed as error:
            log.warning("an error of a hook was suppressed at %s: %r", context.event.value, error)
            return default

    return _around(course)


def _around(course: _Course) -> Callable[[Handler], Handler]:
    """Return the decorator that takes ``course`` around a handler; a plain one stays plain."""

    def decorate(function: Handler) -> Handler:
        @functools.wraps(function)
        async def for_coroutines(context: HookContext) -> Any:
            from asyncio import sleep  # 50 ms, which who has no such handlers does not pay

            return await course(context, lambda: function(context), sleep)

        @functools.wraps(function)
        def for_functions(context: HookContext) -> Any:
            async def call() -> Any:
                return function(context)

            async def sleep(seconds: float) -> None:
                time.sleep(seconds)

            try:
                course(context, call, sleep).send(None)  # nothing in it ever waits for an event loop
            except StopIteration as end:
                return end.value

        return for_coroutines if is_async(function) else for_functions

    return decorate
