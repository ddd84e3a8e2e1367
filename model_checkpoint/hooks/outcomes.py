"""What a handler returned or raised, and what that means."""

from __future__ import annotations

import threading
from typing import Any

from model_checkpoint.hooks.base_hook import HookResult
from model_checkpoint.utils.jsonable import scalar


def interrupt_of(result: HookResult) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that came while a handler ran: it is the user's, not the hook's."""
    return next((error for error in map(users_interrupt, result.errors.values()) if error is not None), None)


def users_interrupt(error: BaseException) -> KeyboardInterrupt | None:
    """Return it if it is the user's Ctrl-C, as far as one can tell: that comes to the main thread."""
    in_main = threading.current_thread() is threading.main_thread()
    return error if in_main and isinstance(error, KeyboardInterrupt) else None


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
        if each is not None and each.__traceback__ is not None and users_interrupt(each) is None:
            each.__traceback__ = None
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def is_veto(returned: Any) -> bool:
    """Whether it is False, NumPy's and torch's included, or says so; 0, an empty list and the like are results."""
    value = returned.get("continue") if isinstance(returned, dict) else returned
    found = scalar(value) if value is not None and not isinstance(value, bool) else value
    return found is False
