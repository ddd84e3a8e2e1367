"""From what somebody registers to a hook that can be run. What cannot is refused here, with its name and argument."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from model_checkpoint.errors import ConfigurationError, HookRegistrationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.utils.checks import check_positive

Handler = Callable[[HookContext], Any]
ErrorHandler = Callable[[BaseException, HookContext], Any]
ENTRY_POINT_GROUP = "model_checkpoint.hooks"
MARK = "checkpoint_hook"  # the attribute of a function that hook_handler has decorated


@dataclass
class Options:
    """How a hook is run: the arguments of ``HookManager.register_hook``."""

    priority: int = HookPriority.NORMAL
    timeout: float | None = None
    async_execution: bool = False
    error_handler: ErrorHandler | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Marked:
    """What the decorator ``hook_handler`` notes on a function."""

    name: str
    events: Iterable[HookEvent | str]
    options: Options


@dataclass(eq=False)
class Hook:
    """A registered hook.

    Attributes:
        name: of it.
        handlers: what to call, by event.
        options: how.
        enabled: whether it runs.
        silenced: whether it does not because it took too long.
        calls, failures, timeouts: how often it ran, failed and took too long in a row.
        total, shortest, longest: seconds.
    """

    name: str
    handlers: Mapping[HookEvent, Handler]
    options: Options
    enabled: bool = True
    silenced: bool = False
    calls: int = 0
    failures: int = 0
    timeouts: int = 0
    total: float = 0.0
    shortest: float = float("inf")
    longest: float = 0.0

    def described(self) -> dict[str, Any]:
        """Return what ``HookManager.list_hooks`` says of it."""
        return {
            "name": self.name,
            "events": [event.value for event in self.handlers],
            "priority": int(self.options.priority),
            "timeout": self.options.timeout,
            "async_execution": self.options.async_execution,
            "enabled": self.enabled,
            "calls": self.calls,
            "failures": self.failures,
            "metadata": dict(self.options.metadata),
        }

    def stats(self) -> dict[str, Any]:
        """Return what ``HookManager.get_performance_stats`` says of it."""
        return {
            "total_calls": self.calls,
            "successful_calls": self.calls - self.failures,
            "failed_calls": self.failures,
            "min_time": 0.0 if self.shortest == float("inf") else self.shortest,
            "avg_time": self.total / self.calls if self.calls else 0.0,
            "max_time": self.longest,
        }


def hook_of(
    name: object, handler: Handler | None, events: Iterable[HookEvent | str] | None, options: Options, has_pool: bool
) -> Hook:
    """Return the hook that ``register_hook`` was asked for; see there for the forms.

    Raises:
        HookRegistrationError: it cannot be one.
    """
    if isinstance(name, str) and handler is None and events is None:
        name = _plugin(name)
    marked: Any = getattr(name, MARK, None)
    if isinstance(name, BaseHook) or isinstance(marked, Marked):
        own = name.name if isinstance(name, BaseHook) and hasattr(name, "name") else getattr(name, "__name__", name)
        if handler is not None or events is not None or options != Options():
            raise HookRegistrationError(f"hook {own!r}: it brings its own handler, events and options; give it alone")
        if isinstance(name, BaseHook):
            return _of_object(name, has_pool)
        return _made(marked.name, dict.fromkeys(_events(marked.name, marked.events), name), marked.options, has_pool)
    if not isinstance(name, str) or not name.strip():
        raise HookRegistrationError(
            f"hook {name!r}: name must be text, an instance of BaseHook or a function decorated with hook_handler"
        )
    return _made(name, dict.fromkeys(_events(name, events), handler), options, has_pool)


def _of_object(hook: BaseHook, has_pool: bool) -> Hook:
    if not hasattr(hook, "name"):
        raise HookRegistrationError(f"hook {type(hook).__name__}: its __init__ must call super().__init__()")
    methods = {event: getattr(hook, event.method) for event in HookEvent if hasattr(hook, event.method)}
    known = [event.method for event in HookEvent]
    for name in dir(type(hook)):
        meant = difflib.get_close_matches(name, known, 1, 0.9) if name.startswith("on_") and name not in known else []
        if meant:
            raise HookRegistrationError(f"hook {hook.name!r}: there is no event for {name}(); {meant[0]} is near")
    if not isinstance(hook.name, str) or not hook.name.strip():
        raise HookRegistrationError(f"hook {hook.name!r}: name must be text")
    executes = type(hook).execute is not BaseHook.execute
    if not executes and not methods:
        raise HookRegistrationError(
            f"hook {hook.name!r}: {type(hook).__name__} has neither execute() nor a method such as {known[0]}"
        )
    handlers = {**dict.fromkeys(_events(hook.name, hook.events), hook.execute), **methods} if executes else methods
    options = Options(hook.priority, hook.timeout, hook.async_execution)
    return _made(hook.name, handlers, options, has_pool)


def _made(name: str, handlers: Mapping[HookEvent, Any], options: Options, has_pool: bool) -> Hook:
    _check_options(name, options)
    for handler in {id(handler): handler for handler in handlers.values()}.values():
        _check_handler(name, handler)
        if not has_pool and (options.async_execution or is_async(handler)):
            raise HookRegistrationError(f"hook {name!r}: handler is async, and this manager has enable_async=False")
    return Hook(name, handlers, options)


def _plugin(name: str) -> object:
    """Return the hook that an installed package offers by this name."""
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        offered = ", ".join(sorted(found)) or "none"
        raise HookRegistrationError(
            f"hook {name!r}: handler must be a function or callable object; without one, the name is that of a hook "
            f"that an installed package brings (entry points {ENTRY_POINT_GROUP}; there: {offered})"
        )
    try:
        loaded = found[name].load()
        made = loaded() if isinstance(loaded, type) and issubclass(loaded, BaseHook) else loaded
    except Exception as error:
        raise HookRegistrationError(f"hook {name!r}: cannot load {found[name].value}: {error!r}") from error
    if not isinstance(made, BaseHook) and not isinstance(getattr(made, MARK, None), Marked):
        raise HookRegistrationError(
            f"hook {name!r}: {found[name].value} is neither a BaseHook nor a function decorated with hook_handler"
        )
    return made


def _check_options(name: str, options: Options) -> None:
    timeout = options.timeout
    told = options.error_handler
    if told is not None and (not callable(told) or is_async(told)):
        raise HookRegistrationError(f"hook {name!r}: error_handler must be a plain function, not {told!r}")
    if not isinstance(options.priority, int) or isinstance(options.priority, bool):
        raise HookRegistrationError(f"hook {name!r}: priority must be an integer, not {options.priority!r}")
    if timeout is not None:
        try:
            check_positive(timeout=timeout)
        except ConfigurationError as error:
            raise HookRegistrationError(f"hook {name!r}: {error}") from None
    if not isinstance(options.async_execution, bool):
        raise HookRegistrationError(
            f"hook {name!r}: async_execution must be True or False, not {options.async_execution!r}"
        )


def _events(name: str, events: Iterable[HookEvent | str] | None) -> tuple[HookEvent, ...]:
    if not isinstance(events, Iterable) or isinstance(events, str):
        raise HookRegistrationError(f"hook {name!r}: events must be a list of HookEvent, not {events!r}")
    try:
        known = tuple(dict.fromkeys(map(event_of, events)))
    except ConfigurationError as error:
        raise HookRegistrationError(f"hook {name!r}: events has an unknown one; {error}") from None
    if not known:
        raise HookRegistrationError(f"hook {name!r}: events is empty, it would never run")
    return known


def event_of(event: object) -> HookEvent:
    """Return the event that is given by itself or its value.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return HookEvent(event)
    except ValueError:
        names = ", ".join(e.name for e in HookEvent)
        raise ConfigurationError(f"there is no event {event!r}; there are {names}") from None


def _check_handler(name: str, handler: Any) -> None:
    if not callable(handler) or isinstance(handler, type):
        raise HookRegistrationError(f"hook {name!r}: handler must be a function or callable object, not {handler!r}")
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise HookRegistrationError(f"hook {name!r}: handler is a generator, of which nothing would run; use return")
    try:
        inspect.signature(handler).bind(None)
    except TypeError as error:
        raise HookRegistrationError(f"hook {name!r}: handler must take one argument, the context ({error})") from None
    except ValueError:
        pass  # a builtin without a signature: nothing to check


def is_async(handler: Any) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
