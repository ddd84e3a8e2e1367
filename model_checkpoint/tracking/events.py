"""What a tracker tells its hooks, and when; docs/hooks.md has the payloads."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Columns
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError, DatabaseError, HookVetoError
from model_checkpoint.hooks import HookEvent, HookManager


@dataclass
class _Watch:
    """A threshold of a metric.

    Attributes:
        above, below: the bounds; None for none.
        beyond: whether the last value was.
    """

    above: float | None
    below: float | None
    beyond: bool = False

    def direction(self, value: float) -> str | None:
        """Return on which side of the bounds ``value`` is: ``above``, ``below``, ``nan``, or None within them."""
        if value != value:
            return "nan"
        if self.above is not None and value > self.above:
            return "above"
        return "below" if self.below is not None and value < self.below else None


class RunEvents:
    """Fires the events of one experiment.

    Args:
        hooks: what they go to. It is not kept alive: handlers often refer to the tracker, which would never end then.
        experiment: which.
        database: where it is.
    """

    def __init__(self, hooks: HookManager, experiment: ExperimentRecord, database: EnhancedDatabaseConnection) -> None:
        self._hooks = ref(hooks)
        self.experiment_id = experiment.id
        self._place = database.place
        self._settle = database.settle
        self._status = experiment.status
        self._began = time.monotonic()
        self._watches: dict[str, list[_Watch]] = {}

    def _fire(self, event: HookEvent, data: Mapping[str, Any]) -> None:
        hooks = self._hooks()
        if hooks is not None and event in hooks.listening:
            result = hooks.fire_hook(event, data=data, experiment_id=self.experiment_id)
            if result.stopped_by is not None:
                raise HookVetoError(result.stopped_by, event.value, result.reason, self.experiment_id)

    def _fire_later(self, event: HookEvent, data: Mapping[str, Any]) -> None:
        hooks = self._hooks()
        if hooks is not None:
            hooks.fire_later(event, data, self.experiment_id)

    def started(self, experiment: ExperimentRecord, resumed: bool) -> None:
        names = ("name", "project", "parent_id", "forked_from", "tags", "config")
        told = copy.deepcopy({name: getattr(experiment, name) for name in names})
        told |= {"tags": list(told["tags"]), "resumed": resumed}
        self._fire(HookEvent.ON_EXPERIMENT_START, told)

    def status_changed(self, status: str) -> None:
        """Tell of a status that is another than the last."""
        previous, self._status = self._status, status
        if status != previous:
            self._fire(HookEvent.ON_EXPERIMENT_STATUS_CHANGE, {"status": status, "previous": previous})

    def ended(self) -> None:
        """Tell that the tracker lets go of the experiment, once the checkpoints that are being saved are durable."""
        try:
            self._settle()
        finally:
            told = {"status": self._status, "seconds": time.monotonic() - self._began}
            self._fire(HookEvent.ON_EXPERIMENT_END, told)

    def collecting(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Ask whether metrics may be logged.

        Raises:
            HookVetoError: a hook says no.
        """
        self._fire(HookEvent.BEFORE_METRIC_COLLECTION, {"metrics": dict(metrics), "step": step})

    def watch(self, name: str, above: float | None, below: float | None) -> None:
        """Fire ON_METRIC_THRESHOLD when the values of a metric go beyond one of these bounds."""
        bounds = [bound for bound in (above, below) if bound is not None]
        if not bounds or any(isinstance(b, bool) or not isinstance(b, (int, float)) or b != b for b in bounds):
            raise ConfigurationError(f"watch_metric({name!r}): give above, below or both as numbers")
        if not isinstance(name, str) or (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ConfigurationError(f"watch_metric({name!r}): {above} and {below} leave nothing between them")
        self._watches.setdefault(name, []).append(_Watch(above, below))

    def collected(self, batch: Mapping[str, Columns], spooled: bool) -> None:
        """Tell of a batch that is stored, or safe in the spool. Called where nobody may wait."""
        hooks = self._hooks()
        if hooks is None or not batch:
            return
        if HookEvent.AFTER_METRIC_COLLECTION in hooks.listening:
            told = {name: _summary(columns) for name, columns in batch.items()}
            points = sum(map(len, batch.values()))
            self._fire_later(HookEvent.AFTER_METRIC_COLLECTION, {"metrics": told, "points": points, "spooled": spooled})
        for name in batch.keys() & self._watches.keys():
            for watch in self._watches[name]:
                self._look(watch, name, batch[name])

    def _look(self, watch: _Watch, name: str, columns: Columns) -> None:
        """Tell of the first value of a batch that goes beyond a threshold, unless the last one before it was there."""
        first: tuple[int, str] | None = None
        count = 0
        for index, value in enumerate(columns.values):
            direction = watch.direction(value)
            count += direction is not None
            if direction is not None and not watch.beyond and first is None:
                first = index, direction
            watch.beyond = direction is not None
        if first is not None:
            index, direction = first
            told = {
                "metric": name,
                "value": columns.values[index],
                "step": columns.step(index),
                "timestamp": columns.times[index],
                "direction": direction,
                "above": watch.above,
                "below": watch.below,
                "count": count,
            }
            self._fire_later(HookEvent.ON_METRIC_THRESHOLD, told)

    def database_failed(self, error: DatabaseError) -> None:
        """Tell of an error of the database. Called where nobody may wait."""
        self._fire_later(HookEvent.ON_DATABASE_ERROR, {"error": str(error), "database": self._place})


def _summary(columns: Columns) -> dict[str, Any]:
    last = len(columns) - 1
    real = [value for value in columns.values if value == value] or [float("nan")]
    low, high = min(real), max(real)
    return {"count": last + 1, "last": columns.values[last], "step": columns.step(last), "min": low, "max": high}


def hooks_of(given: HookManager | None) -> HookManager:
    """Return the hooks of a tracker, new ones for None.

    Raises:
        ConfigurationError: ``given`` is something else.
    """
    if given is not None and not isinstance(given, HookManager):
        raise ConfigurationError(f"hook_manager must be a HookManager or None, not {given!r}")
    return HookManager() if given is None else given
