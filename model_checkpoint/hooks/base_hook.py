"""What a hook is: events, priorities, the context that a handler gets and the result of firing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any


class HookEvent(str, Enum):
    """The moments at which hooks run. A BEFORE event can be vetoed; the others only tell."""

    BEFORE_CHECKPOINT_SAVE = "before_checkpoint_save"
    AFTER_CHECKPOINT_SAVE = "after_checkpoint_save"
    ON_CHECKPOINT_SAVE_FAILED = "on_checkpoint_save_failed"
    BEFORE_CHECKPOINT_LOAD = "before_checkpoint_load"
    AFTER_CHECKPOINT_LOAD = "after_checkpoint_load"
    BEFORE_CHECKPOINT_DELETE = "before_checkpoint_delete"
    AFTER_CHECKPOINT_DELETE = "after_checkpoint_delete"
    BEFORE_INTEGRITY_CHECK = "before_integrity_check"
    AFTER_INTEGRITY_CHECK = "after_integrity_check"

    @property
    def can_be_vetoed(self) -> bool:
        """Whether a handler may stop what is about to happen."""
        return self.value.startswith("before_")


class HookPriority(IntEnum):
    """Named priorities; any integer will do. The lower runs first."""

    CRITICAL = 0
    HIGH = 10
    NORMAL = 50
    LOW = 90
    BACKGROUND = 100


@dataclass
class HookContext:
    """What a handler is given. Changing it changes nothing in the engine.

    Attributes:
        event: what happens.
        data: facts of the event by name, such as ``epoch``, ``loss`` and ``metrics`` of a save.
        checkpoint_id, experiment_id: what it is about, or None.
        user_data: a place for handlers of one firing to leave things for each other.
        metadata: what the hook was registered with (``**metadata``).
    """

    event: HookEvent
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint_id: str | None = None
    experiment_id: str | None = None
    user_data: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return ``data[name]``, or ``default``."""
        return self.data.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """Set ``data[name]`` for the handlers that follow."""
        self.data[name] = value

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several names of ``data``."""
        self.data.update(values)


@dataclass
class HookResult:
    """The outcome of firing one event.

    Attributes:
        success: no handler failed and none vetoed.
        results: hook name -> what its handler returned.
        stopped_by: the hook that vetoed, or None.
        reason: the ``reason`` that it gave, or None.
        errors: hook name -> the exception that it raised.
    """

    success: bool = True
    results: dict[str, Any] = field(default_factory=dict)
    stopped_by: str | None = None
    reason: str | None = None
    errors: dict[str, BaseException] = field(default_factory=dict)

    def get_result(self, name: str) -> Any:
        """Return what the hook ``name`` returned, or None."""
        return self.results.get(name)


class BaseHook:
    """A hook with state of its own: subclass it and write ``execute``.

    Args:
        name: unique in its manager; the class's name unless given.
        events: when it runs; the class attribute ``events`` unless given, which is before every checkpoint save.
        priority: the lower runs first.
    """

    events: Sequence[HookEvent] = (HookEvent.BEFORE_CHECKPOINT_SAVE,)

    def __init__(
        self,
        name: str | None = None,
        events: Sequence[HookEvent] | None = None,
        priority: int = HookPriority.NORMAL,
    ) -> None:
        self.name = name or type(self).__name__
        self.events = tuple(events if events is not None else type(self).events)
        self.priority = priority

    def execute(self, context: HookContext) -> Any:
        """Do the hook's work.

        Returns:
            True or None to go on; False or ``{"continue": False, "reason": ...}`` to veto a BEFORE event; anything
            else is kept as the result.
        """
        raise NotImplementedError(f"{type(self).__name__} must define execute(self, context)")
