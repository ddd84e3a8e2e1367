"""What a manager tells its hooks, and when; docs/hooks.md has the payloads."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from model_checkpoint.checkpoint.recovery import RecoveryReport
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError, DatabaseError, HookVetoError
from model_checkpoint.hooks import HookContext, HookEvent, HookManager, HookResult
from model_checkpoint.hooks.outcomes import interrupt_of, text_of

log = logging.getLogger(__name__)
AFTER_SAVE = frozenset({HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.ON_BEST_MODEL_UPDATE})


class CheckpointEvents:
    """Fires the events of a manager; ``EnhancedCheckpointManager`` sets it up."""

    hook_manager: HookManager | None
    checkpoint_dir: str | os.PathLike[str]
    _db: EnhancedDatabaseConnection
    _interrupt: BaseException | None = None  # the user's, put off until the save that it came in has ended

    def _fire(
        self,
        event: HookEvent,
        data: Mapping[str, Any],
        checkpoint_id: str | None = None,
        experiment_id: str | None = None,
    ) -> HookResult:
        """Run the hooks of ``event``; returns what came of it.

        A Ctrl-C that comes meanwhile is raised when they have run, or at
        BEFORE_CHECKPOINT_SAVE when the save has ended.

        Raises:
            HookVetoError: one vetoes.
        """
        if self.hook_manager is None or event not in self.hook_manager.listening:
            return HookResult()
        result = self.hook_manager.run_hooks(event, HookContext(event, dict(data), checkpoint_id, experiment_id))
        interrupt = interrupt_of(result)
        if interrupt is not None:
            if event is not HookEvent.BEFORE_CHECKPOINT_SAVE or result.stopped_by is not None:
                raise interrupt
            self._interrupt = interrupt
        if result.stopped_by is not None:
            raise HookVetoError(result.stopped_by, event.value, result.reason, checkpoint_id or experiment_id)
        return result

    def _raise_interrupt(self) -> None:
        """Raise the Ctrl-C that came in a hook before this save, now that it has ended."""
        interrupt = self._interrupt
        if interrupt is not None and threading.current_thread() is threading.main_thread():
            self._interrupt = None
            raise interrupt

    def _tell_saved(self, record: CheckpointRecord, taken: Mapping[str, float], blocked: float) -> None:
        told = {**payload(record), "size": record.size, "best": sorted(taken), "blocked_seconds": blocked}
        self._fire(HookEvent.AFTER_CHECKPOINT_SAVE, told, record.id, record.experiment_id)
        if taken:
            self._tell_best(record, record.experiment_id, dict(taken), "saved")

    def _tell_failed(self, record: CheckpointRecord, error: BaseException) -> None:
        text = f"{type(error).__name__}: {text_of(error)}"
        told = {**payload(record), "error": text}
        self._fire(HookEvent.ON_CHECKPOINT_SAVE_FAILED, told, record.id, record.experiment_id)
        self._raise_interrupt()

    def _tell_best(
        self,
        holder: CheckpointRecord | None,
        experiment_id: str,
        criteria: Mapping[str, float | None],
        cause: str,
    ) -> None:
        told = {
            "criteria": dict(criteria),
            "cause": cause,
            "epoch": None if holder is None else holder.epoch,
            "step": None if holder is None else holder.step,
        }
        checkpoint_id = None if holder is None else holder.id
        self._fire(HookEvent.ON_BEST_MODEL_UPDATE, told, checkpoint_id, experiment_id)

    def _tell_new_holders(self, experiment_id: str, criteria: Collection[str], cause: str) -> None:
        """Tell who holds best flags that have passed on, or that nobody does."""
        if self.hook_manager is None or HookEvent.ON_BEST_MODEL_UPDATE not in self.hook_manager.listening:
            return
        try:
            records = self._db.checkpoints.of_experiment(experiment_id)
        except DatabaseError as error:  # what this would tell of is done
            log.exception("hooks are not told who is the best of experiment %s now", experiment_id)
            self.hook_manager.report_error("database", error, experiment_id)
            return
        holders = {criterion: record for record in records for criterion in record.best}
        for holder in {id(r): r for r in (holders.get(c) for c in criteria)}.values():
            mine = [c for c in sorted(criteria) if holders.get(c) is holder]
            scores = {c: None if holder is None else holder.score(c) for c in mine}
            self._tell_best(holder, experiment_id, scores, cause)

    def _tell_damage(
        self, checkpoint_id: str, experiment_id: str, files: Sequence[Mapping[str, Any]], operation: str
    ) -> None:
        """Tell of files that are not as they were saved."""
        names = ("name", "expected", "actual", "problem")
        told = [{name: file[name] for name in names} for file in files]
        self._fire(
            HookEvent.ON_INTEGRITY_FAILURE, {"files": told, "operation": operation}, checkpoint_id, experiment_id
        )

    def _tell_recovery(self, report: RecoveryReport | None, cause: str) -> None:
        if report:
            self._fire(HookEvent.ON_RECOVERY, {**copy.deepcopy(vars(report)), "cause": cause})

    def _tell_life(self, event: HookEvent) -> None:
        """Tell that the manager was opened or closed."""
        told = {"checkpoint_dir": os.fspath(self.checkpoint_dir), "database": self._db.place, "pid": os.getpid()}
        self._fire(event, told)

    def _tell_database_error(self, error: DatabaseError) -> None:
        if self.hook_manager is not None:
            self.hook_manager.fire_later(HookEvent.ON_DATABASE_ERROR, {"error": str(error), "database": self._db.place})


def payload(record: CheckpointRecord) -> dict[str, Any]:
    """Return what hooks are told of a save; copies, so that nothing a hook does to it reaches the checkpoint."""
    names = ("checkpoint_type", "epoch", "step", "loss", "val_loss", "metrics", "config", "notes", "model_name")
    return copy.deepcopy({name: getattr(record, name) for name in names})


def hooks_of(tracker: object, given: HookManager | None, enabled: bool) -> HookManager | None:
    """Return the hooks of a manager: those given, else the tracker's, else its own; None without hooks.

    Raises:
        ConfigurationError: ``given`` is no ``HookManager``, or not wanted.
    """
    if given is not None and not (enabled and isinstance(given, HookManager)):
        raise ConfigurationError(f"hook_manager must be a HookManager, with enable_hooks=True, not {given!r}")
    if not enabled:
        return None
    found: HookManager | None = given or getattr(tracker, "hook_manager", None)
    return HookManager() if found is None else found
