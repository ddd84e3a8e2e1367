"""What stays and what goes: pinning, retention, deletion and the trash. The one place that removes checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from model_checkpoint.checkpoint.background import SaveQueue
from model_checkpoint.checkpoint.best import elect, with_sound_holders
from model_checkpoint.checkpoint.catalog import CheckpointCatalog
from model_checkpoint.checkpoint.retention import (
    Protection,
    RetentionPlan,
    RetentionPolicy,
    advice_of,
    plan_by_count,
    plan_by_policy,
)
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    HookVetoError,
    LockTimeoutError,
)
from model_checkpoint.hooks import HookEvent

log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds that an explicit removal waits for saves of other processes
_RETENTION_PATIENCE = 0.2  # seconds that a save's retention pass waits; the next save makes up for a skipped one


class CheckpointRemoval(CheckpointCatalog):
    """Removal and its opposites; ``EnhancedCheckpointManager`` sets it up."""

    _queue: SaveQueue
    _protection: Protection
    _policy: RetentionPolicy | None
    _max_checkpoints: int | None
    _save_frequency: int

    def _settle(self) -> None:
        """Let this manager's own saves be durable before anything is looked up or removed."""
        if self._queue.jobs or self._queue.failures:
            self._queue.wait()
            self._queue.raise_failure()

    def pin(self, checkpoint_id: str) -> None:
        """Protect a checkpoint from retention and ``delete_checkpoint`` until it is unpinned.

        This and all that removes or brings back waits for this manager's background saves first.

        Raises:
            CheckpointNotFoundError: there is none with this id here.
            SaveFailedError: a save in the background failed, and nobody was told yet.
        """
        self._set_pinned(checkpoint_id, True)

    def unpin(self, checkpoint_id: str) -> None:
        """Take the protection of ``pin`` back.

        Raises:
            CheckpointNotFoundError, SaveFailedError: as from ``pin``.
        """
        self._set_pinned(checkpoint_id, False)

    def _set_pinned(self, checkpoint_id: str, pinned: bool) -> None:
        self._settle()
        if not self._db.checkpoints.set_pinned(self._record(checkpoint_id).id, pinned):
            raise CheckpointNotFoundError(checkpoint_id, "it was deleted meanwhile; list_trash() shows it")

    def retention_plan(self, experiment_id: str | None = None) -> RetentionPlan:
        """Return what a retention pass would remove now, and why each other checkpoint stays; nothing is changed.

        Raises:
            ExperimentNotFoundError: no experiment is named and there is no tracker.
        """
        return self._plan(self._named_experiment(experiment_id), self._policy)

    def _plan(self, experiment_id: str, policy: RetentionPolicy | None) -> RetentionPlan:
        records = self._db.checkpoints.records(self._directory.store_id, experiment_id)
        records = with_sound_holders(records, self._best_metrics)
        if policy is not None:
            return plan_by_policy(records, policy, self._protection, time.time())
        return plan_by_count(records, self._max_checkpoints, self._save_frequency, self._protection)

    def _retain(self, experiment_id: str) -> None:
        """Carry out the retention plan after a save; what another process is using is left to the next pass."""
        try:
            policy, kept = self._advice(experiment_id)
            doomed = [i for i in self._plan(experiment_id, policy).removed if i not in kept]
            doomed = [i for i in doomed if self._may_go(experiment_id, i) is None]
            gone: list[tuple[CheckpointRecord, str]] = []
            if doomed:
                with self._directory.exclusive(_RETENTION_PATIENCE):
                    gone = self._remove(
                        experiment_id, lambda: self._plan(experiment_id, policy).removed, doomed, new_pass=True
                    )
        except (LockTimeoutError, HookVetoError) as error:
            log.warning("no retention pass of experiment %s: %s", experiment_id, error)
            return
        except Exception as error:
            # The checkpoint is saved: not even a user's policy may make that look like a failure.
            log.exception("retention of experiment %s failed; the next save tries again", experiment_id)
            if self.hook_manager is not None:
                self.hook_manager.report_error("retention", error, experiment_id)
            return
        self._after_removal(gone)
        told = {"removed": {r.id: why for r, why in gone}, "reclaimed": sum(r.size for r, _ in gone)}
        self._fire(HookEvent.AFTER_RETENTION, told, None, experiment_id)

    def _advice(self, experiment_id: str) -> tuple[RetentionPolicy | None, set[str]]:
        """Return the policy of a pass, what BEFORE_RETENTION hooks advise together or else the manager's own.

        Returns:
            It, and the ids of checkpoints that stay besides, as hooks say.

        Raises:
            HookVetoError: there is to be no pass, as a hook says, or because one could not say.
            ConfigurationError: what one said is no advice.
        """
        event = HookEvent.BEFORE_RETENTION
        if self.hook_manager is None:
            return self._policy, set()
        for name in self.hook_manager.silenced(event):
            raise HookVetoError(name, event.value, f"it is disabled; enable_hook({name!r}) or unregister it")
        if event not in self.hook_manager.listening:
            return self._policy, set()
        plan = self._plan(experiment_id, self._policy)
        result = self._fire(event, {"removed": plan.removed, "kept": plan.kept}, None, experiment_id)
        for name in result.errors:  # it may have wanted to keep what the manager's own rule would remove
            raise HookVetoError(name, event.value, "it failed", experiment_id)
        return advice_of(result.results, self._policy)

    def _may_go(self, experiment_id: str, checkpoint_id: str) -> HookVetoError | None:
        """Ask the BEFORE hooks of a removal; return their veto or None."""
        try:
            self._fire(HookEvent.BEFORE_CHECKPOINT_DELETE, {}, checkpoint_id, experiment_id)
        except HookVetoError as veto:
            return veto
        return None

    def _after_removal(self, gone: Collection[tuple[CheckpointRecord, str]]) -> None:
        for record, reason in gone:
            told = {"reason": reason, "epoch": record.epoch, "step": record.step, "size": record.size}
            self._fire(HookEvent.AFTER_CHECKPOINT_DELETE, told, record.id, record.experiment_id)
        lost = {record.experiment_id: set().union(*(r.best for r, _ in gone)) for record, _ in gone}
        for experiment_id, criteria in lost.items():
            self._tell_new_holders(experiment_id, criteria, "removed")

    def _remove(
        self, experiment_id: str, reread: Callable[[], Mapping[str, str]], only: Collection[str], new_pass: bool
    ) -> list[tuple[CheckpointRecord, str]]:
        """Move checkpoints to the trash, tombstones first; the caller holds the directory's lock alone.

        Args:
            experiment_id: whose.
            reread: returns id -> reason of what may go, called in the transaction, so that it sees the latest rows.
            only: of these, the ones that nobody vetoed.
            new_pass: a retention pass, which also unlinks what passes before the last one removed.

        Returns:
            What went, with the reasons.
        """
        store, rows, graves = self._directory.store_id, self._db.checkpoints, self._db.tombstones
        self._directory.check_writable()
        with self._db.transaction(durable=True):
            generation = graves.generation(store, experiment_id)
            doomed = {key: reason for key, reason in reread().items() if key in only}
            records = rows.of_experiment(experiment_id)  # in every directory: best flags are the experiment's
            gone = [(record, doomed[record.id]) for record in records if record.id in doomed]
            stay = [record for record in records if record.id not in doomed]
            best = {experiment_id: elect(stay, self._best_metrics)} if any(r.best for r, _ in gone) else {}
            graves.add(store, doomed, generation + new_pass, best)
        for checkpoint_id in doomed:
            self._directory.trash(experiment_id, checkpoint_id)
        if new_pass:
            self._purge(experiment_id, generation)
        return gone

    def _purge(self, experiment_id: str | None, before_generation: int | None = None) -> int:
        found = self._db.tombstones.content(self._directory.store_id, experiment_id, before_generation)
        trashed = set(self._directory.in_trash())
        for checkpoint_id, owner, *_ in found:
            if checkpoint_id not in trashed:  # a crash came before the move; without its row nobody would finish it
                self._directory.trash(owner, checkpoint_id)
        self._db.tombstones.purge([checkpoint_id for checkpoint_id, *_ in found])
        for checkpoint_id, *_ in found:
            self._directory.unlink_trashed(checkpoint_id)
        return sum(size for *_, size in found)

    def delete_checkpoint(self, checkpoint_id: str) -> bool:
        """Move a checkpoint to the trash; best flags that it held pass to the next best.

        ``undelete`` brings it back until the trash is emptied: by ``empty_trash``, or by the second retention pass of
        the experiment that removes something after this.

        Returns:
            True.

        Raises:
            CheckpointNotFoundError: there is none with this id here.
            ConfigurationError: it is pinned.
            HookVetoError: a hook stopped it.
            LockTimeoutError: saves of other processes kept the directory busy for 10 seconds.
            StorageError: the directory cannot be written; nothing was changed.
            SaveFailedError: a save in the background failed, and nobody was told yet.
        """
        self._settle()
        record = self._record(checkpoint_id)
        self._still_deletable(checkpoint_id)
        veto = self._may_go(record.experiment_id, checkpoint_id)
        if veto is not None:
            raise veto
        with self._directory.exclusive(_PATIENCE):
            gone = self._remove(
                record.experiment_id, lambda: self._still_deletable(checkpoint_id), [checkpoint_id], new_pass=False
            )
        self._after_removal(gone)
        return True

    def _still_deletable(self, checkpoint_id: str) -> dict[str, str]:
        record = self._db.checkpoints.get(self._directory.store_id, checkpoint_id)
        if record is None:
            raise CheckpointNotFoundError(checkpoint_id, "it was deleted already; list_trash() shows it")
        if record.pinned:
            raise ConfigurationError(f"checkpoint {checkpoint_id} is pinned; unpin({checkpoint_id!r}) first")
        return {checkpoint_id: "deleted by the user"}

    def undelete(self, checkpoint_id: str) -> None:
        """Bring a removed checkpoint back from the trash, pinned, or the next retention pass would take it again.

        Raises:
            CheckpointNotFoundError: it is not in the trash (any more).
            LockTimeoutError: saves of other processes kept the directory busy for 10 seconds.
            SaveFailedError: a save in the background failed, and nobody was told yet.
        """
        self._settle()
        store, rows, graves = self._directory.store_id, self._db.checkpoints, self._db.tombstones
        with self._directory.exclusive(_PATIENCE):
            found = {key: experiment for key, experiment, *_ in graves.content(store)}
            experiment_id = found.get(checkpoint_id)
            if experiment_id is None or not self._directory.restore(experiment_id, checkpoint_id):
                raise CheckpointNotFoundError(f"{checkpoint_id} in the trash", "list_trash() shows what is there")
            with self._db.transaction(durable=True):
                graves.remove(store, checkpoint_id)
                rows.set_pinned(checkpoint_id, True)
                holders = elect(rows.of_experiment(experiment_id), self._best_metrics)
                rows.replace_holders(experiment_id, holders)
        won = [criterion for criterion, (holder, _) in holders.items() if holder == checkpoint_id]
        self._tell_new_holders(experiment_id, won, "undeleted")

    def list_trash(self, experiment_id: str | None = None) -> list[dict[str, Any]]:
        """Return what ``undelete`` can bring back, the longest there first.

        Args:
            experiment_id: whose; the tracker's when None, and all experiments' without a tracker.

        Returns:
            Dicts with ``checkpoint_id``, ``experiment_id``, ``reason`` and ``size`` (bytes).
        """
        names = ("checkpoint_id", "experiment_id", "reason", "size")
        wanted = self._whose(experiment_id)
        return [dict(zip(names, row)) for row in self._db.tombstones.content(self._directory.store_id, wanted)]

    def empty_trash(self, experiment_id: str | None = None) -> int:
        """Remove what is in the trash for good.

        Args:
            experiment_id: whose; the tracker's when None, and all experiments' without a tracker.

        Returns:
            The bytes reclaimed.

        Raises:
            LockTimeoutError: saves of other processes kept the directory busy for 10 seconds.
            SaveFailedError: a save in the background failed, and nobody was told yet.
        """
        self._settle()
        with self._directory.exclusive(_PATIENCE):
            return self._purge(self._whose(experiment_id))
