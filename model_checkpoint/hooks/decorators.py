"""Decorators for handlers, plain and ``async def`` ones; those that change how a handler runs may be stacked."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks.base_hook import HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.registration import MARK, ErrorHandler, Handler, Marked, Options, is_async
from model_checkpoint.utils.checks import check_count, check_positive

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

    Raises:
        ConfigurationError: ``name`` is None, and the function has none.
    """
    options = Options(priority, timeout, async_execution, error_handler, metadata)

    def mark(function: Function) -> Function:
        known = name or getattr(function, "__name__", None)
        if known is None:
            raise ConfigurationError(f"hook_handler: {function!r} has no name of its own; give it one, name=...")
        chosen = [events] if isinstance(events, str) else events  # an event is a text, too
        setattr(function, MARK, Marked(known, chosen, options))
        return function

    return mark


def async_hook_handler(events: _Events, **options: Any) -> Callable[[Function], Function]:
    """Do what ``hook_handler`` does, with ``async_execution=True``: the event does not wait for the function."""
    return hook_handler(events, **{**options, "async_execution": True})


def conditional_hook(condition: Callable[[HookContext], Any]) -> Callable[[Handler], Handler]:
    """Let the handler run only where ``condition(context)`` is true, a plain function; elsewhere it returns None.

    Raises:
        ConfigurationError: ``condition`` is none.
    """
    if not callable(condition) or is_async(condition):
        raise ConfigurationError(f"conditional_hook takes a plain function of the context, not {condition!r}")

    async def course(context: HookContext, call: Callable[[], Awaitable[Any]], sleep: object) -> Any:
        return await call() if condition(context) else None

    return _around(course)


def retry_on_failure(
    tries: int = 3,
    delay: float = 0.1,
    backoff: float = 2.0,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Callable[[Handler], Handler]:
    """Call the handler again when it fails.

    Args:
        tries: how often at most in all, from 1; what the last call raises is the failure.
        delay: seconds before the second call. Where the event waits for the handler, it waits for these, too.
        backoff: what the delay grows by each time, as a factor.
        errors: which exceptions.

    Raises:
        ConfigurationError: one of these is no such number, or ``errors`` are no exceptions.
    """
    check_count(tries=tries)
    check_positive(delay=delay, backoff=backoff)
    _check_exceptions("retry_on_failure", errors if isinstance(errors, tuple) else (errors,))

    async def course(
        context: HookContext, call: Callable[[], Awaitable[Any]], sleep: Callable[[float], Awaitable[None]]
    ) -> Any:
        for attempt in range(tries - 1):
            try:
                return await call()
            except errors as error:
                log.warning("a hook failed at %s, call %d of %d: %r", context.event.value, attempt + 1, tries, error)
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

    Raises:
        ConfigurationError: ``errors`` are no exceptions.
    """
    _check_exceptions("suppress_errors", errors)

    suppressed = errors or (Exception,)

    async def course(context: HookContext, call: Callable[[], Awaitable[Any]], sleep: object) -> Any:
        try:
            return await call()
        except suppressed as error:
            log.warning("an error of a hook was suppressed at %s: %r", context.event.value, error)
            return default

    return _around(course)


def _check_exceptions(decorator: str, errors: tuple[object, ...]) -> None:
    """Refuse what is no class of exceptions, such as the function under a decorator that was not called."""
    for error in errors:
        if not (isinstance(error, type) and issubclass(error, Exception)):
            raise ConfigurationError(f"{decorator} takes classes of exceptions, not {error!r}; write @{decorator}()")


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
