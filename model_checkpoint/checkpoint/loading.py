"""From a checkpoint on disk to a state in memory: the load path, readable here from top to bottom."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from model_checkpoint.arrays import check_framework
from model_checkpoint.checkpoint.arguments import check_choice, check_flags
from model_checkpoint.checkpoint.best import elect
from model_checkpoint.checkpoint.reader import CheckpointReader
from model_checkpoint.checkpoint.removal import CheckpointRemoval
from model_checkpoint.checkpoint.selection import check_keys
from model_checkpoint.database.models import CheckpointRecord, decode_details
from model_checkpoint.errors import CheckpointNotFoundError, ExperimentNotFoundError, IntegrityError
from model_checkpoint.hooks import HookEvent
from model_checkpoint.integrity.verification import read_manifest

log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointLoading(CheckpointRemoval):
    """Loading; ``EnhancedCheckpointManager`` sets it up."""

    _integrity: bool
    _threads: int

    def load_checkpoint(  # noqa: PLR0913 - the names and defaults are the specification's
        self,
        checkpoint_id: str | None = None,
        experiment_id: str | None = None,
        checkpoint_type: str = "latest",
        verify_integrity: bool = True,
        device: object = None,
        load_optimizer: bool = True,
        load_scheduler: bool = True,
        *,
        keys: str | Collection[str] | None = None,
        framework: str | None = None,
        on_corruption: str = "raise",
    ) -> dict[str, Any]:
        """Load a checkpoint; every byte is compared with its digest before it is decoded, and no code of it runs.

        Args:
            checkpoint_id: which; when None, the one that ``experiment_id`` and ``checkpoint_type`` say.
            experiment_id: whose; the tracker's when None.
            checkpoint_type: ``latest``, ``best_loss``, ``best_val_loss``, ``best_metric``, ``best:<metric>``, or a
                label given when saving, of which the newest is taken.
            verify_integrity: False maps the files without reading them: fast, but a changed byte goes unseen.
            device: where torch tensors go, file by file while the next one is read; None is host memory.
            load_optimizer, load_scheduler: False leaves that part out, unread.
            keys: patterns of what is wanted, such as ``model.encoder.*``, matched (as file names are) against component
                and keys joined by dots; what matches comes with all below it. Of uncompressed SafeTensors files, only
                the chunks that hold it are read and verified. Other items of a list or tuple become None.
            framework: ``numpy``, ``torch``, ``jax`` or ``tensorflow``: whose arrays to make of all, with dtypes and
                shapes as they are; strings of bytes stay what they are. None: those of the library that each was saved
                from where it is installed, else NumPy's, else memoryviews.
            on_corruption: ``raise``, or ``fallback``: instead of a corrupt checkpoint load the next of its kind that is
                sound (the next best, the newest one before it), with a warning and ``fallback_from`` in the metadata.

        Returns:
            A dict with ``model_state_dict``, ``optimizer_state_dict``, ``scheduler_state_dict``, ``extra_state`` (None
            where there is none), ``epoch``, ``step``, ``loss``, ``val_loss``, ``metrics``, ``config`` and
            ``_checkpoint_metadata``. The caller owns all of it.

        Raises:
            ExperimentNotFoundError: nothing says which experiment, or it is not in the database.
            CheckpointNotFoundError: there is none; UnknownCheckpointTypeError: the type is unknown.
            IntegrityError: a file is missing or changed, also of the latest or best; the text names file and digests.
                With ``fallback``, no sound one is left.
            SaveFailedError: an earlier save in the background failed.
            ConfigurationError: nothing matches ``keys``, the device cannot be used, ``framework`` or ``on_corruption``
                is none of theirs, the framework has no such dtype, or a flag is none.
            HookVetoError: a BEFORE hook stopped it.
            MissingDependencyError: the backend or compression that it was saved with needs a package, or ``framework``.
        """
        started = time.perf_counter()
        self._settle()
        check_choice("on_corruption", on_corruption, ("raise", "fallback"))
        check_flags(verify_integrity=verify_integrity, load_optimizer=load_optimizer, load_scheduler=load_scheduler)
        if framework is not None:
            check_framework(framework)
        patterns = check_keys(keys)
        wanted = self._experiment_to_load(checkpoint_id, experiment_id)
        components = {"model", "extra"}
        components |= ({"optimizer"} if load_optimizer else set()) | ({"scheduler"} if load_scheduler else set())
        verify = verify_integrity and self._integrity

        def read(reader: CheckpointReader) -> dict[str, Any]:
            return reader.load(components, device, patterns, framework)

        record, state, refused = self._read_chosen(
            checkpoint_id, wanted, checkpoint_type, on_corruption == "fallback", partial(self._read, verify, read)
        )
        self._tally.count(record.experiment_id, loads=1, load_seconds=time.perf_counter() - started)
        told = self._flags(record)
        if refused:
            told["fallback_from"] = list(refused)
        return {
            **{f"{name}_state_dict": state.get(name) for name in ("model", "optimizer", "scheduler")},
            "extra_state": state.get("extra"),
            **self._loaded(record, told),
        }

    def _experiment_to_load(self, checkpoint_id: str | None, experiment_id: str | None) -> str | None:
        wanted = self._whose(experiment_id)
        if checkpoint_id is None and wanted is None:
            raise ExperimentNotFoundError("Must provide experiment_id or checkpoint_id when there is no tracker")
        return wanted

    def _loaded(self, record: CheckpointRecord, told: dict[str, Any]) -> dict[str, Any]:
        self._fire(HookEvent.AFTER_CHECKPOINT_LOAD, told, record.id, record.experiment_id)
        return {
            **{name: getattr(record, name) for name in ("epoch", "step", "loss", "val_loss")},
            **copy.deepcopy({"metrics": record.metrics, "config": record.config}),  # the record may be in the cache
            "_checkpoint_metadata": told,
        }

    def _read_chosen(
        self,
        checkpoint_id: str | None,
        experiment_id: str | None,
        checkpoint_type: str,
        fall_back: bool,
        read: Callable[[CheckpointRecord], tuple[CheckpointRecord, T]],
    ) -> tuple[CheckpointRecord, T, list[str]]:
        """Read the checkpoint that was asked for, or a sound one in its place.

        Returns:
            The checkpoint, what ``read`` returned of it, and the ids of those that were corrupt before it.
        """
        refused: list[str] = []
        gone: list[str] = []
        substitute: CheckpointRecord | None = None
        while True:
            record = substitute or self._wanted(checkpoint_id, experiment_id, checkpoint_type)
            self._fire(HookEvent.BEFORE_CHECKPOINT_LOAD, {}, record.id, record.experiment_id)
            try:
                return *read(record), refused
            except CheckpointNotFoundError:  # removed since it was looked up
                if record.id in (checkpoint_id, *gone):
                    raise
                gone.append(record.id)
                substitute = None
            except IntegrityError as error:
                bad = {"name": error.path, "expected": error.expected, "actual": error.actual, "problem": str(error)}
                self._tell_damage(record.id, record.experiment_id, [bad], "load")
                refused += [record.id] if record.id not in refused else []
                if not fall_back:
                    raise
                kind = "latest" if checkpoint_id is not None else checkpoint_type
                first = self._db.checkpoints.get(self._directory.store_id, refused[0]) or record
                substitute = self._substitute(first, kind, [*refused, *gone])
                if substitute is None:
                    raise
                log.warning("%s; %s is loaded in its place", error, substitute.id)

    def _wanted(self, checkpoint_id: str | None, experiment_id: str | None, checkpoint_type: str) -> CheckpointRecord:
        if checkpoint_id is not None:
            return self._record(checkpoint_id)
        found = self._resolve(experiment_id, checkpoint_type)
        while True:
            try:
                return self._record(found)
            except CheckpointNotFoundError:  # removed since it was looked up, or the database is damaged
                earlier, found = found, self._resolve(experiment_id, checkpoint_type)
                if found == earlier:
                    raise

    def _substitute(self, first: CheckpointRecord, kind: str, refused: Collection[str]) -> CheckpointRecord | None:
        """Return the next of its kind that nothing is known against: the next best, or the newest one before it."""
        records = self._db.checkpoints.records(self._directory.store_id, first.experiment_id)
        sound = {r.id: r for r in records if r.status == "committed" and r.id not in refused}
        criterion = self._criterion(first.experiment_id, kind)
        if criterion is not None:
            holder = elect(sound.values(), self._best_metrics).get(criterion)
            return None if holder is None else sound[holder[0]]
        before = [r for r in sound.values() if (r.sequence or 0) < (first.sequence or 0)]
        return next((r for r in reversed(before) if kind in ("latest", r.checkpoint_type)), None)

    def _read(
        self, verify: bool, read: Callable[[CheckpointReader], T], record: CheckpointRecord
    ) -> tuple[CheckpointRecord, T]:
        """Open a checkpoint for ``read``, and record what that showed of its files.

        Returns:
            The record, with the values of the manifest, which unlike the row's are sealed, and what ``read`` returned.
        """
        with self._directory.shared():  # nothing is removed while it is read
            if self._db.checkpoints.get(self._directory.store_id, record.id) is None:
                raise CheckpointNotFoundError(record.id, "it was deleted meanwhile; list_trash() shows it")
            folder = self._directory.folder(record.experiment_id, record.id)
            try:
                manifest, _ = read_manifest(folder, record.manifest_sha256)
            except IntegrityError as error:
                self._note(record.id, error, [])
                raise
            reader = CheckpointReader(folder, manifest, verify, self._threads)
            try:
                result = read(reader)
            except IntegrityError as error:
                if not reader.sound:
                    self._note(record.id, error, [])
                raise
            if verify and len(reader.checks) == len(manifest.files):  # a part says nothing of the whole
                self._note(record.id, None, reader.checks)
            return replace(record, **decode_details(manifest.values)), result
