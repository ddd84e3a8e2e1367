"""The checkpoints of one directory as a user sees them: listing, finding, verification, statistics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

from model_checkpoint.checkpoint.arguments import NAMED_TYPES, check_flags, check_id
from model_checkpoint.checkpoint.best import direction
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.checkpoint.events import CheckpointEvents
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    IntegrityError,
    UnknownCheckpointTypeError,
)
from model_checkpoint.hooks import HookEvent
from model_checkpoint.integrity import CheckpointVerifier
from model_checkpoint.integrity.verification import summarise
from model_checkpoint.performance import LRUCache
from model_checkpoint.performance.statistics import Tally
from model_checkpoint.utils.names import is_id

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a manager asks of an ``ExperimentTracker``."""

    @property
    def experiment_id(self) -> str:
        """UUID text."""

    @property
    def database(self) -> EnhancedDatabaseConnection:
        """Where it tracks to."""

    @property
    def spooled(self) -> Collection[int]:
        """Points of each batch that waits in a file for the database to come back."""

    @property
    def unflushed(self) -> Collection[Any]:
        """What is buffered."""

    @property
    def version(self) -> int:
        """Grows when config or tags change."""

    def flush(self) -> None:
        """Store what is buffered."""


class CheckpointCatalog(CheckpointEvents):
    """What can be asked of checkpoints without loading them; ``EnhancedCheckpointManager`` sets it up."""

    _directory: CheckpointDirectory
    _tracker: Tracker | None
    _cache: LRUCache | None
    _best_metrics: dict[str, str]
    _tally: Tally

    def list_checkpoints(
        self,
        experiment_id: str | None = None,
        checkpoint_type: str | None = None,
        include_metadata: bool = True,
    ) -> list[dict[str, Any]]:
        """Return this directory's checkpoints in the order of their saves.

        Args:
            experiment_id: whose; the tracker's when None, and all experiments' without a tracker.
            checkpoint_type: only this type: a label given when saving, or a type to load by (``best_val_loss``).
            include_metadata: with the values given when saving, too.

        Returns:
            Dicts with ``checkpoint_id``, ``experiment_id``, ``sequence``, ``epoch``, ``step``, ``checkpoint_type``,
            ``created_at`` (Unix seconds), ``size`` (bytes), ``status`` (``committed`` or ``corrupt``), ``pinned``,
            ``best`` (criteria), the three ``is_best_*`` flags and ``verification`` (the last outcome, or None);
            with metadata also ``loss``, ``val_loss``, ``metrics``, ``config``, ``notes``, ``model_name``, ``backend``
            and ``path``.

        Raises:
            ExperimentNotFoundError: ``experiment_id`` is no id.
            UnknownCheckpointTypeError: ``checkpoint_type`` is no text.
            ConfigurationError: the flag is none.
        """
        check_flags(include_metadata=include_metadata)
        if checkpoint_type is not None and not isinstance(checkpoint_type, str):
            raise UnknownCheckpointTypeError(checkpoint_type, NAMED_TYPES)
        experiment_id = self._whose(experiment_id)
        records = self._db.checkpoints.records(self._directory.store_id, experiment_id)
        if checkpoint_type == "latest":
            newest = {record.experiment_id: record.id for record in records}
            records = [record for record in records if newest[record.experiment_id] == record.id]
        elif checkpoint_type is not None:
            records = [r for r in records if self._is_of_type(r, checkpoint_type)]
        return [self._describe(record, include_metadata) for record in records]

    @property
    def experiment_id(self) -> str | None:
        """The experiment of the manager's tracker, or None without one."""
        return self._whose(None)

    def best_direction(self, metric: str) -> str:
        """Return ``min`` or ``max``: what the best value of a metric is, see ``best_metrics``."""
        return direction(metric, self._best_metrics)

    def _whose(self, experiment_id: str | None) -> str | None:
        """Return the experiment that is meant: the tracker's for None, and None without a tracker."""
        if experiment_id is None:
            return self._tracker.experiment_id if self._tracker is not None else None
        if not is_id(experiment_id):
            raise self._no_experiment(experiment_id)
        return experiment_id

    def _named_experiment(self, experiment_id: str | None) -> str:
        found = self._whose(experiment_id)
        if found is None:
            raise ExperimentNotFoundError("Must provide experiment_id, or give the manager an experiment_tracker")
        return found

    def _primary_metric(self, experiment_id: str) -> str:
        """Return the criterion behind ``best_metric``: the first of ``best_metrics``, else the first ever saved."""
        if self._best_metrics:
            return f"metrics.{next(iter(self._best_metrics))}"
        held = self._db.checkpoints.holders(experiment_id)
        if not all(isinstance(criterion, str) for criterion in held):
            raise DatabaseError(f"a best flag in {self._db!r} is damaged; rebuild_index() finds the best anew")
        return next((criterion for criterion in held if criterion.startswith("metrics.")), "metrics.")

    def _criterion(self, experiment_id: str, checkpoint_type: str) -> str | None:
        if checkpoint_type in ("best_loss", "best_val_loss"):
            return checkpoint_type.removeprefix("best_")
        if checkpoint_type == "best_metric":
            return self._primary_metric(experiment_id)
        name = checkpoint_type.removeprefix("best:")
        if name == checkpoint_type:
            return None
        return name if name in ("loss", "val_loss") else f"metrics.{name}"

    def _is_of_type(self, record: CheckpointRecord, checkpoint_type: str) -> bool:
        criterion = self._criterion(record.experiment_id, checkpoint_type)
        return record.checkpoint_type == checkpoint_type if criterion is None else criterion in record.best

    def _flags(self, record: CheckpointRecord) -> dict[str, Any]:
        primary = self._primary_metric(record.experiment_id) if record.best else ""
        return {
            "checkpoint_id": record.id,
            "experiment_id": record.experiment_id,
            "epoch": record.epoch,
            "step": record.step,
            "checkpoint_type": record.checkpoint_type,
            "is_best_loss": "loss" in record.best,
            "is_best_val_loss": "val_loss" in record.best,
            "is_best_metric": primary in record.best,
        }

    def _describe(self, record: CheckpointRecord, include_metadata: bool) -> dict[str, Any]:
        told = {
            **self._flags(record),
            "sequence": record.sequence,
            "created_at": record.created_at,
            "size": record.size,
            "status": record.status,
            "pinned": record.pinned,
            "best": sorted(record.best),
            "verification": record.verification,
        }
        if include_metadata:
            names = ("loss", "val_loss", "metrics", "config", "notes", "model_name", "backend")
            told.update({name: getattr(record, name) for name in names})
            told["path"] = self._directory.folder(record.experiment_id, record.id)
        return told

    def _cached(self, key: tuple[str, ...], read: Callable[[], Any]) -> Any:
        """Return ``read()``, or what it returned before if no process has changed the store's checkpoints since."""
        if self._cache is None:
            return read()
        revision = self._db.checkpoints.revision(self._directory.store_id)  # before reading, so an entry is never newer
        entry = self._cache.get(key)
        if entry is None or entry[0] != revision:
            entry = (revision, read())
            self._cache.set(key, entry)
        return entry[1]

    def _record(self, checkpoint_id: str) -> CheckpointRecord:
        check_id(checkpoint_id)
        record = self._cached(
            ("record", checkpoint_id), lambda: self._db.checkpoints.get(self._directory.store_id, checkpoint_id)
        )
        if record is None:
            raise CheckpointNotFoundError(checkpoint_id, f"list_checkpoints() shows those in {self._directory.path}")
        return record  # type: ignore[no-any-return]

    def _resolve(self, experiment_id: str | None, checkpoint_type: str) -> str:
        if not is_id(experiment_id):
            raise self._no_experiment(experiment_id)
        if not isinstance(checkpoint_type, str):
            raise UnknownCheckpointTypeError(checkpoint_type, NAMED_TYPES)
        found = self._cached(
            ("resolve", experiment_id, checkpoint_type), lambda: self._look_up(experiment_id, checkpoint_type)
        )
        if found is not None:
            return str(found)
        store = self._directory.store_id
        if self._db.experiments.get(experiment_id) is None:
            raise ExperimentNotFoundError(
                f"experiment {experiment_id!r} is not in {self._db!r}; check the id and database"
            )
        if self._criterion(experiment_id, checkpoint_type) is None and checkpoint_type != "latest":
            labels = {r.checkpoint_type for r in self._db.checkpoints.records(store, experiment_id)}
            raise UnknownCheckpointTypeError(checkpoint_type, [*NAMED_TYPES, *sorted(labels)])
        elsewhere = self._db.stores.elsewhere(store, experiment_id, self._directory.path)
        advice = f"it has checkpoints in {', '.join(elsewhere)}; open that directory" if elsewhere else "save one first"
        raise CheckpointNotFoundError(
            f"{checkpoint_type} of experiment {experiment_id} in {self._directory.path}", advice
        )

    def _no_experiment(self, experiment_id: object) -> ExperimentNotFoundError:
        return ExperimentNotFoundError(f"experiment {experiment_id!r} is not in {self._db!r}: ids are UUIDs as text")

    def _look_up(self, experiment_id: str, checkpoint_type: str) -> str | None:
        store, rows = self._directory.store_id, self._db.checkpoints
        criterion = self._criterion(experiment_id, checkpoint_type)
        if criterion is None:
            return rows.latest(store, experiment_id, None if checkpoint_type == "latest" else checkpoint_type)
        return rows.holder(store, experiment_id, criterion)

    def verify_experiment_integrity(
        self, experiment_id: str | None = None, on_bytes: Callable[[int], object] | None = None
    ) -> dict[str, Any]:
        """Hash every file of every checkpoint and compare; every outcome is recorded.

        Args:
            experiment_id: whose; the tracker's when None, and all in this directory without a tracker.
            on_bytes: called with the number of bytes after each part that was hashed, for progress bars.

        Returns:
            ``total_checkpoints``, ``verified``, ``failed`` and ``checkpoint_results`` (by id: ``verified``, ``error``,
            ``verified_at``, ``files`` with both digests of each).

        Raises:
            HookVetoError: a hook stopped it.
        """
        verifier = CheckpointVerifier(self._db)
        wanted = self._whose(experiment_id)
        results = []
        for record in self._db.checkpoints.records(self._directory.store_id, wanted):
            self._fire(HookEvent.BEFORE_INTEGRITY_CHECK, {}, record.id, record.experiment_id)
            try:
                with self._directory.shared():  # nothing is removed while it is hashed
                    results.append(verifier.verify_checkpoint(record.id, on_bytes))
            except CheckpointNotFoundError:
                continue  # removed since it was listed
            outcome = {"verified": results[-1]["verified"], "error": results[-1]["error"]}
            self._fire(HookEvent.AFTER_INTEGRITY_CHECK, outcome, record.id, record.experiment_id)
            bad = [check for check in results[-1]["files"] if not check["ok"]]
            if bad:
                self._tell_damage(record.id, record.experiment_id, bad, "verification")
        return summarise(results)

    def _note(self, checkpoint_id: str, error: IntegrityError | None, checks: list[dict[str, Any]]) -> None:
        """Record the verification that a load was; loading does not depend on that."""
        if error is not None:
            found = {"expected": error.expected, "actual": error.actual, "problem": str(error)}
            checks = [{"name": error.path, "ok": False, **found}]
        outcome = {"verified": error is None, "error": None if error is None else str(error), "files": checks}
        try:
            self._db.verifications.record(checkpoint_id, outcome, time.time())
        except DatabaseError:
            log.exception("the verification of %s could not be recorded; loading goes on", checkpoint_id)

    def _give_up(self, checkpoint_id: str) -> None:
        """Mark a save as failed; its own error is the one to tell of, should that fail, too."""
        try:
            self._db.checkpoints.fail(checkpoint_id)
        except DatabaseError:
            log.exception("the failed save %s could not be marked as such; recovery will", checkpoint_id)

    def get_experiment_statistics(self, experiment_id: str | None = None) -> dict[str, Any]:
        """Return counts and sizes of one experiment's checkpoints here (the tracker's when None).

        Returns:
            ``experiment_id``, ``total_checkpoints``, ``total_size`` (bytes), ``by_type`` (label -> count), ``pinned``,
            ``corrupt``, ``first_epoch``, ``last_epoch``, and ``best``: criterion -> ``checkpoint_id`` and ``value``.

        Raises:
            ExperimentNotFoundError: no experiment is named and there is no tracker.
        """
        experiment_id = self._named_experiment(experiment_id)
        records = self._db.checkpoints.records(self._directory.store_id, experiment_id)
        labels = [record.checkpoint_type for record in records]
        return {
            "experiment_id": experiment_id,
            "total_checkpoints": len(records),
            "total_size": sum(record.size for record in records),
            "by_type": {label: labels.count(label) for label in dict.fromkeys(labels)},
            "pinned": sum(record.pinned for record in records),
            "corrupt": sum(record.status == "corrupt" for record in records),
            "first_epoch": min((record.epoch for record in records), default=None),
            "last_epoch": max((record.epoch for record in records), default=None),
            "best": {c: {"checkpoint_id": r.id, "value": r.score(c)} for r in records for c in sorted(r.best)},
        }

    def get_performance_statistics(self) -> dict[str, Any]:
        """Return what this manager did, in this process.

        Returns:
            Sums: ``saves``, ``loads``, ``bytes_written``, ``save_seconds``, ``load_seconds``, ``stall_seconds`` (for
            which background saves held up their callers). Of the newest 1,000 of each, once there was one:
            ``stall_p50_seconds``, ``stall_p95_seconds``, ``stall_p99_seconds``, and the same of ``save`` and ``load``.
            ``write_gb_per_second``; ``pending_saves``; ``experiments``: id -> the same sums and percentiles; ``cache``
            as ``LRUCache.stats`` has it (None without one); ``hooks`` as ``HookManager.get_performance_stats`` has it.
        """
        told: dict[str, Any] = dict.fromkeys(_SUMS, 0.0) | self._tally.summary() | self._tally.gauged()
        told["experiments"] = {each: self._tally.summary(each) for each in self._tally.experiments()}
        told["cache"] = self._cache.stats() if self._cache is not None else None
        told["hooks"] = self.hook_manager.get_performance_stats() if self.hook_manager is not None else {}
        return told


_SUMS = ("saves", "save_seconds", "stall_seconds", "bytes_written", "loads", "load_seconds")
GAUGES: dict[str, Callable[[Any], float]] = {
    "pending_saves": lambda manager: len(manager.pending()),
    "cache_hits": lambda manager: manager._cache.stats()["hits"] if manager._cache else 0,
    "cache_misses": lambda manager: manager._cache.stats()["misses"] if manager._cache else 0,
}


def database_of(tracker: Tracker | None, url: str | None) -> EnhancedDatabaseConnection:
    """Return the tracker's database, or without a tracker the one at ``url`` (None: ``sqlite:///experiments.db``)."""
    if tracker is not None:
        if url is not None and url != tracker.database.database_url:
            raise ConfigurationError(
                f"database_url {url!r} is not the tracker's, {tracker.database.database_url!r}; leave it out"
            )
        return tracker.database
    return EnhancedDatabaseConnection(url or "sqlite:///experiments.db")
