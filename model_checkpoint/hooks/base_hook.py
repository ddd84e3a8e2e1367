"""What a hook is: events, priorities, the context that a handler gets and the result of firing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any


class HookEvent(str, Enum):
    """The moments at which hooks run; docs/hooks.md says what each brings.

    A BEFORE event can be vetoed; the others only tell.
    """

    BEFORE_CHECKPOINT_SAVE = "before_checkpoint_save"
    AFTER_CHECKPOINT_SAVE = "after_checkpoint_save"
    ON_CHECKPOINT_SAVE_FAILED = "on_checkpoint_save_failed"
    BEFORE_CHECKPOINT_LOAD = "before_checkpoint_load"
    AFTER_CHECKPOINT_LOAD = "after_checkpoint_load"
    BEFORE_CHECKPOINT_DELETE = "before_checkpoint_delete"
    AFTER_CHECKPOINT_DELETE = "after_checkpoint_delete"
    BEFORE_INTEGRITY_CHECK = "before_integrity_check"
    AFTER_INTEGRITY_CHECK = "after_integrity_check"
    ON_INTEGRITY_FAILURE = "on_integrity_failure"
    BEFORE_RETENTION = "before_retention"
    AFTER_RETENTION = "after_retention"
    ON_BEST_MODEL_UPDATE = "on_best_model_update"
    BEFORE_METRIC_COLLECTION = "before_metric_collection"
    AFTER_METRIC_COLLECTION = "after_metric_collection"
    ON_METRIC_THRESHOLD = "on_metric_threshold"
    ON_EXPERIMENT_START = "on_experiment_start"
    ON_EXPERIMENT_STATUS_CHANGE = "on_experiment_status_change"
    ON_EXPERIMENT_END = "on_experiment_end"
    ON_DATABASE_ERROR = "on_database_error"
    ON_RECOVERY = "on_recovery"
    BEFORE_TRAINING_STEP = "before_training_step"
    AFTER_FORWARD_PASS = "after_forward_pass"
    BEFORE_LOSS_COMPUTATION = "before_loss_computation"
    AFTER_LOSS_COMPUTATION = "after_loss_computation"
    ON_SYSTEM_START = "on_system_start"
    ON_SYSTEM_SHUTDOWN = "on_system_shutdown"
    ON_ERROR = "on_error"

    __hash__ = str.__hash__  # Enum's own is a function of Python: 0.1 us for every look whether somebody listens

    @property
    def can_be_vetoed(self) -> bool:
        """Whether a handler may stop what is about to happen."""
        return self.value.startswith("before_")

    @property
    def method(self) -> str:
        """The method of a hook object that handles this event."""
        return self.value if self.value.startswith("on_") else f"on_{self.value}"


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

    def copy(self) -> HookContext:
        """Return a context with dicts and lists of its own, for a handler that goes on beside those that follow it."""
        ids = self.checkpoint_id, self.experiment_id
        return HookContext(self.event, _copied(self.data), *ids, _copied(self.user_data), dict(self.metadata))


def _copied(value: Any) -> Any:
    """Return ``value`` with new dicts and lists; what else is in it, such as an array, is the same."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return list(map(_copied, value)) if type(value) is list else value


@dataclass
class HookResult:
    """The outcome of firing one event.

    Attributes:
        success: no handler failed and none vetoed.
        results: hook name -> what its handler returned. Of handlers in the background, which may run yet, nothing is
            here, and no errors.
        stopped_by: the hook that vetoed, or None.
        reason: the ``reason`` that it gave, or None.
        errors: hook name -> the exception that it raised, a ``HookTimeoutError`` for one that took too long. Without
            its traceback, which is in the log: that would keep what the handler was given alive.
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
    """A hook with state of its own: subclass it and write ``execute``, or a method ``on_<event>`` for each event.

    ``on_before_checkpoint_save`` handles BEFORE_CHECKPOINT_SAVE and ``on_metric_threshold`` handles
    ON_METRIC_THRESHOLD: of events that begin with ON, the name is the method's. Events that have no such method go to
    ``execute``. Methods may be ``async def``.

    Args:
        name: unique in its manager; the class's name unless given.
        events: when ``execute`` runs, an event or several; the class attribute ``events`` unless given, which is
            before every checkpoint save. A class that has ``on_<event>`` methods and no ``execute`` needs none.
        priority: the lower runs first.
        timeout, async_execution: see ``HookManager.register_hook``.
    """

    events: Sequence[HookEvent] = (HookEvent.BEFORE_CHECKPOINT_SAVE,)

    def __init__(
        self,
        name: str | None = None,
        events: HookEvent | Sequence[HookEvent] | None = None,
        priority: int = HookPriority.NORMAL,
        timeout: float | None = None,
        async_execution: bool = False,
    ) -> None:
        self.name = name or type(self).__name__
        chosen = events if events is not None else type(self).events
        self.events = (chosen,) if isinstance(chosen, str) else tuple(chosen)  # an event is a text, too
        self.priority = priority
        self.timeout = timeout
        self.async_execution = async_execution

    def execute(self, context: HookContext) -> Any:
        """Do the hook's work.

        Returns:
            True or None to go on; False or ``{"continue": False, "reason": ...}`` to veto a BEFORE event; anything
            else is kept as the result.
        """
        raise NotImplementedError(f"{type(self).__name__} must define execute(self, context)")
