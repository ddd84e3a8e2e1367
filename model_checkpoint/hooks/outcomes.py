"""What a handler returned or raised, and what that means."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

from model_checkpoint.hooks.base_hook import HookContext, HookEvent, HookResult
from model_checkpoint.utils.jsonable import scalar


def interrupt_of(result: HookResult) -> BaseException | None:
    """Return the user's interrupt that came while a handler ran, see ``users_interrupt``."""
    return next((error for error in map(users_interrupt, result.errors.values()) if error is not None), None)


def users_interrupt(error: BaseException) -> BaseException | None:
    """Return it if it is the user's and not the hook's: Ctrl-C, or the exit that a signal handler has raised.

    As far as one can tell: signals come to the main thread, and what their handlers raise has these in its traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    if isinstance(error, KeyboardInterrupt):
        return error
    return error if isinstance(error, SystemExit) and _is_of_a_signal(error) else None


def _is_of_a_signal(error: SystemExit) -> bool:
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def text_of(error: BaseException) -> str:
    """Return an error's text, also of one that fails to say it."""
    try:
        return str(error)
    except Exception as problem:  # noqa: BLE001 - a broken __str__ must not take the place of the error
        return f"(its text cannot be had: {type(problem).__name__})"


def forget_frames(error: BaseException) -> None:
    """Drop the traceback of an error that was reported, and those of its causes.

    Their frames, and by way of these the callers', would keep each other, the result and the handler's arrays alive.
    """
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        with suppress(Exception):  # an exception may have such attributes of its own, which fail
            if each is not None and each.__traceback__ is not None and users_interrupt(each) is None:
                each.with_traceback(None)
                left += [each.__cause__, each.__context__]
                if type(getattr(each, "exceptions", None)) is tuple:  # a group
                    left += each.exceptions  # type: ignore[attr-defined]


def mend(context: HookContext, event: HookEvent) -> None:
    """Let a context be one again, whatever a handler has done to it."""
    facts = vars(context)
    if (
        facts.get("event") is event
        and type(facts.get("data")) is type(facts.get("user_data")) is dict
        and len(facts) > 5
    ):
        return  # as nearly always
    context.event = event
    for name in ("data", "user_data"):
        if not isinstance(getattr(context, name, None), dict):
            setattr(context, name, {})
    for name in ("checkpoint_id", "experiment_id"):
        if not hasattr(context, name):
            setattr(context, name, None)
    context.metadata = {}


def copied(context: HookContext) -> HookContext:
    """Return a copy of a context, for a handler that goes on beside those that follow it."""
    try:
        return context.copy()
    except Exception:  # noqa: BLE001 - another thread may be writing into it, or it may hold itself
        ids = context.checkpoint_id, context.experiment_id
        return HookContext(context.event, dict(context.data), *ids, dict(context.user_data), {})


def is_veto(returned: Any) -> bool:
    """Whether it is False, NumPy's and torch's included, or says so; 0, an empty list and the like are results."""
    value = returned.get("continue") if isinstance(returned, dict) else returned
    found = scalar(value) if value is not None and not isinstance(value, bool) else value
    return found is False
