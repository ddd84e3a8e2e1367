"""The checkpoint manager: the save path and the load path, each readable here from top to bottom."""

from __future__ import annotations

import copy
import operator
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from model_checkpoint.checkpoint.arguments import check_at_least_one, check_constructor, label, numbers
from model_checkpoint.checkpoint.best import check_overrides, flags_taken
from model_checkpoint.checkpoint.catalog import Tracker, database_of, payload
from model_checkpoint.checkpoint.compression import best_codec
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.checkpoint.reader import STATE_FILE, CheckpointReader
from model_checkpoint.checkpoint.recovery import recover
from model_checkpoint.checkpoint.removal import CheckpointRemoval
from model_checkpoint.checkpoint.retention import Protection, RetentionPolicy
from model_checkpoint.checkpoint.state import encode
from model_checkpoint.checkpoint.storage import PlannedFile
from model_checkpoint.checkpoint.storage import storage_backend as find_backend
from model_checkpoint.database.checkpoints import details_of
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    ExperimentNotFoundError,
    IntegrityError,
    UnsupportedValueError,
)
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.integrity.manifest import FileEntry, Manifest
from model_checkpoint.integrity.verification import read_manifest
from model_checkpoint.performance import LRUCache
from model_checkpoint.utils.jsonable import escape, text, to_jsonable, to_number

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["EnhancedCheckpointManager"]


class EnhancedCheckpointManager(CheckpointRemoval):
    """Saves training state crash-proof and verified, finds the best, keeps what the retention policy says, and loads.

    One manager may be used by many threads, and one directory by many managers and processes.

    Args:
        experiment_tracker: the run that checkpoints belong to; its database is used.
        checkpoint_dir: made when it does not exist; ``./checkpoints`` when None.
        storage_backend: ``safetensors``, ``pytorch``, or a name given to ``register_storage_backend``.
        enable_compression: compress losslessly, with zstd where it is installed, else gzip.
        enable_integrity_checks: compute SHA-256 while saving and compare it when loading.
        enable_caching: keep metadata of checkpoints in memory; what another process changes is seen on the next read.
        cache_size: entries of that cache.
        save_best: keep the holders of best flags.
        save_last: keep the newest.
        save_frequency: epochs that are multiples of it go last when ``max_checkpoints`` is exceeded.
        max_checkpoints: checkpoints kept of an experiment, protected ones included; None keeps all.
        database_url: for a manager without a tracker; ``sqlite:///experiments.db`` when None.
        enable_hooks: without, ``hook_manager`` is None.
        best_metrics: metric name -> ``min`` or ``max`` where the name does not tell; the first is ``best_metric``.
        protected_types: checkpoint types that are never removed.
        retention_policy: replaces ``max_checkpoints`` and ``save_frequency``: ``KeepLast(3) | KeepBest(2, "f1")``.
        max_shard_size: bytes of array data above which a file is split.

    Raises:
        ConfigurationError: an argument that cannot be used.
        UnknownBackendError: no backend has that name.
        StorageError: the directory cannot be made or written.
        FormatVersionError: directory or database were written by a newer version of this package.
        DatabaseError: the database cannot be opened.
    """

    def __init__(  # noqa: PLR0913 - the names and defaults are the specification's
        self,
        experiment_tracker: Tracker | None = None,
        checkpoint_dir: str | PathLike[str] | None = None,
        storage_backend: str = "safetensors",
        enable_compression: bool = False,
        enable_integrity_checks: bool = True,
        enable_caching: bool = True,
        cache_size: int = 500,
        save_best: bool = True,
        save_last: bool = True,
        save_frequency: int = 5,
        max_checkpoints: int | None = 10,
        database_url: str | None = None,
        enable_hooks: bool = True,
        *,
        best_metrics: Mapping[str, str] | None = None,
        protected_types: Collection[str] = (),
        retention_policy: RetentionPolicy | None = None,
        max_shard_size: int = 5 << 30,  # 5 GiB
    ) -> None:
        check_constructor(experiment_tracker, retention_policy, protected_types, best_metrics)
        check_at_least_one(save_frequency=save_frequency, max_checkpoints=max_checkpoints)
        check_at_least_one(max_shard_size=max_shard_size, cache_size=cache_size)
        self.checkpoint_dir = "checkpoints" if checkpoint_dir is None else checkpoint_dir
        self.hook_manager = HookManager() if enable_hooks else None
        self._backend = find_backend(storage_backend)
        self._codec = best_codec() if enable_compression else None
        self._integrity = enable_integrity_checks
        self._cache = LRUCache(cache_size) if enable_caching else None
        self._best_metrics = check_overrides(best_metrics or {})
        self._protection = Protection(save_best, save_last, frozenset(protected_types))
        self._policy = retention_policy
        self._max_checkpoints = max_checkpoints
        self._save_frequency = save_frequency
        self._max_shard_size = max_shard_size
        self._tracker = experiment_tracker
        self._experiments: dict[str, tuple[int, dict[str, Any]]] = {}
        self._totals = dict.fromkeys(("saves", "save_seconds", "bytes_written", "loads", "load_seconds"), 0.0)
        self._totals_lock = threading.Lock()
        self._directory = CheckpointDirectory(self.checkpoint_dir)
        self._db = database_of(experiment_tracker, database_url)
        recover(self._directory, self._db, self._best_metrics)

    def save_checkpoint(  # noqa: PLR0913 - the names and defaults are the specification's
        self,
        model: object,
        optimizer: object = None,
        scheduler: object = None,
        epoch: int = 0,
        step: int = 0,
        loss: Any = None,
        val_loss: Any = None,
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        notes: str | None = None,
        model_name: str | None = None,
        experiment_id: str | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        compute_checksum: bool = True,
        update_best: bool = True,
        checkpoint_type: str | None = None,
        *,
        extra_state: object = None,
    ) -> str:
        """Save a checkpoint; when this returns, it survives a crash of the process, the machine and the power.

        Args:
            model, optimizer, scheduler: anything with ``state_dict()``, or a nested dict, list or tuple of arrays and
                plain values. They are only read, and must not be changed until this returns.
            epoch, step: integers.
            loss, val_loss: numbers or scalars of an array library; NaN is stored and never best.
            metrics: name -> number; each is a criterion of its own for the best flags.
            config: any JSON value, scalars of array libraries included.
            notes, model_name: text.
            experiment_id: whose checkpoint it is; the tracker's when None.
            save_optimizer, save_scheduler: False leaves that part out.
            compute_checksum: False saves without digests; only lengths can be verified then.
            update_best: False keeps it out of the competition for best flags.
            checkpoint_type: a label to list, protect and load by, of letters, digits, ``_.-``; ``regular`` when None.
            extra_state: whatever else training needs to go on, such as RNG states; same forms as ``model``.

        Returns:
            The checkpoint's id, a UUID of 36 characters.

        Raises:
            ExperimentNotFoundError: no experiment is named, or it is not in the database.
            UnsupportedValueError: a value that cannot be stored without pickle; the text names its path.
            HookVetoError: a BEFORE hook stopped it.
            StorageError: the disk is full or refused; earlier checkpoints are untouched.
            DatabaseError: the database refused; the next manager on this directory finds what was published.
        """
        started = time.perf_counter()
        epoch, step = _integers(epoch=epoch, step=step)
        record = CheckpointRecord(
            id=str(uuid.uuid4()),
            experiment_id=self._experiment_to_save(experiment_id),
            checkpoint_type="regular" if checkpoint_type is None else label(checkpoint_type),
            epoch=epoch,
            step=step,
            loss=loss if loss is None or type(loss) is float else to_number(loss, "loss"),
            val_loss=val_loss if val_loss is None or type(val_loss) is float else to_number(val_loss, "val_loss"),
            metrics={} if not metrics else numbers(metrics),
            config=None if config is None else to_jsonable(config, "config"),
            notes=notes if notes is None else text(notes, "notes"),
            model_name=model_name if model_name is None else text(model_name, "model_name"),
            backend=self._backend.name,
            created_at=time.time(),
            update_best=update_best,
        )
        components = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra": extra_state}
        for name, wanted in (("optimizer", save_optimizer), ("scheduler", save_scheduler), ("extra", True)):
            if components[name] is None or not wanted:
                del components[name]
        details = details_of(record)
        planned = self._plan(components)
        hooks = self.hook_manager
        if hooks is not None and HookEvent.BEFORE_CHECKPOINT_SAVE in hooks.listening:
            self._fire(HookEvent.BEFORE_CHECKPOINT_SAVE, payload(record), record.id, record.experiment_id)
        if self._tracker is not None and self._tracker.unflushed:
            self._tracker.flush()  # so that the commit notes where the metrics stood
        with self._directory.shared():
            record, taken, count = self._write(record, details, planned, compute_checksum and self._integrity)
        self._count(saves=1, save_seconds=time.perf_counter() - started, bytes_written=record.size)
        if hooks is not None and HookEvent.AFTER_CHECKPOINT_SAVE in hooks.listening:
            outcome = {**payload(record), "size": record.size, "best": sorted(taken)}
            self._fire(HookEvent.AFTER_CHECKPOINT_SAVE, outcome, record.id, record.experiment_id)
        if self._policy is not None or (self._max_checkpoints is not None and count > self._max_checkpoints):
            self._retain(record.experiment_id)
        return record.id

    def _plan(self, components: Mapping[str, object]) -> list[PlannedFile]:
        state = encode(components)
        tree = state.to_json()
        state_file = PlannedFile(STATE_FILE, None, len(tree), operator.methodcaller("write", tree))
        return [*self._backend.plan(state, self._max_shard_size), state_file]

    def _write(
        self, record: CheckpointRecord, details: Mapping[str, Any], planned: Sequence[PlannedFile], hashed: bool
    ) -> tuple[CheckpointRecord, Mapping[str, float], int]:
        """Intent, bytes, manifest, publication, commit; returns record, flags taken, and how many there are now."""
        store, rows = self._directory.store_id, self._db.checkpoints
        sequence = rows.begin(record, details, store)
        try:
            manifest_of = partial(self._manifest, record, details, sequence)
            entries, digest = self._directory.write(
                record.experiment_id, record.id, planned, manifest_of, codec=self._codec, hashed=hashed
            )
        except BaseException:
            self._give_up(record.id)
            raise
        record = replace(record, size=sum(map(operator.attrgetter("size"), entries)), manifest_sha256=digest)
        files = map(operator.attrgetter("name", "size", "sha256"), entries)
        return (record, *rows.commit(record, store, files, partial(flags_taken, overrides=self._best_metrics)))

    def _manifest(
        self, record: CheckpointRecord, details: Mapping[str, Any], sequence: int, entries: Sequence[FileEntry]
    ) -> tuple[bytes, str]:
        experiment = self._experiments[record.experiment_id][1]
        files = tuple(entries)
        return Manifest(record.id, record.created_at, record.backend, sequence, experiment, details, files).to_bytes()

    def _experiment_to_save(self, experiment_id: str | None) -> str:
        """Return the experiment's id, after noting what manifests tell of it."""
        tracker = self._tracker
        if experiment_id is None and tracker is not None:
            experiment_id = tracker.experiment_id
        if experiment_id is None:
            raise ExperimentNotFoundError(
                "No experiment_id provided and the manager has no experiment_tracker; pass one of them"
            )
        version = 0 if tracker is None else tracker.version
        known = self._experiments.get(experiment_id)
        if known is None or known[0] != version:
            self._experiments[experiment_id] = (version, self._tell_of(experiment_id))
        return experiment_id

    def _tell_of(self, experiment_id: str) -> dict[str, Any]:
        found = self._db.experiments.get(experiment_id)
        if found is None:
            raise ExperimentNotFoundError(
                f"experiment {experiment_id!r} is not in {self._db!r}; create it with ExperimentTracker(...)"
            )
        names = ("id", "name", "project", "parent_id", "created_at", "config", "metadata", "tags")
        return {name: escape(getattr(found, name)) for name in names}

    def _count(self, **more: float) -> None:
        with self._totals_lock:
            for name, value in more.items():
                self._totals[name] += value

    def load_checkpoint(
        self,
        checkpoint_id: str | None = None,
        experiment_id: str | None = None,
        checkpoint_type: str = "latest",
        verify_integrity: bool = True,
        device: object = None,
        load_optimizer: bool = True,
        load_scheduler: bool = True,
    ) -> dict[str, Any]:
        """Load a checkpoint; every byte is compared with its digest before it is decoded, and no code of it runs.

        Args:
            checkpoint_id: which; when None, the one that ``experiment_id`` and ``checkpoint_type`` say.
            experiment_id: whose; the tracker's when None.
            checkpoint_type: ``latest``, ``best_loss``, ``best_val_loss``, ``best_metric``, ``best:<metric>``, or a
                label given when saving, of which the newest is taken.
            verify_integrity: False maps the files without reading them: fast, but a changed byte goes unseen.
            device: where torch tensors go; None is host memory.
            load_optimizer, load_scheduler: False leaves that part out, unread.

        Returns:
            A dict with ``model_state_dict``, ``optimizer_state_dict``, ``scheduler_state_dict``, ``extra_state`` (None
            where there is none), ``epoch``, ``step``, ``loss``, ``val_loss``, ``metrics``, ``config`` and
            ``_checkpoint_metadata``. The caller owns all of it.

        Raises:
            ExperimentNotFoundError: nothing says which experiment, or it is not in the database.
            CheckpointNotFoundError: there is none; UnknownCheckpointTypeError: the type is unknown.
            IntegrityError: a file is missing or changed, also of the latest or best; the text names file and digests.
            HookVetoError: a BEFORE hook stopped it.
            MissingDependencyError: the backend or compression that it was saved with needs a package.
        """
        started = time.perf_counter()
        wanted = experiment_id or self._own_experiment()
        if checkpoint_id is None and wanted is None:
            raise ExperimentNotFoundError("Must provide experiment_id or checkpoint_id when there is no tracker")
        components = {"model", "extra"}
        components |= ({"optimizer"} if load_optimizer else set()) | ({"scheduler"} if load_scheduler else set())
        while True:
            record = self._record(self._resolve(wanted, checkpoint_type) if checkpoint_id is None else checkpoint_id)
            self._fire(HookEvent.BEFORE_CHECKPOINT_LOAD, {}, record.id, record.experiment_id)
            try:
                state = self._read(record, components, verify_integrity and self._integrity, device)
                break
            except CheckpointNotFoundError:  # removed since it was looked up
                if checkpoint_id is not None:
                    raise
        self._count(loads=1, load_seconds=time.perf_counter() - started)
        loaded = {
            **{f"{name}_state_dict": state.get(name) for name in ("model", "optimizer", "scheduler")},
            "extra_state": state.get("extra"),
            **{name: getattr(record, name) for name in ("epoch", "step", "loss", "val_loss")},
            **copy.deepcopy({"metrics": record.metrics, "config": record.config}),  # the record may be in the cache
            "_checkpoint_metadata": self._flags(record),
        }
        self._fire(HookEvent.AFTER_CHECKPOINT_LOAD, loaded["_checkpoint_metadata"], record.id, record.experiment_id)
        return loaded

    def _read(
        self, record: CheckpointRecord, components: Collection[str], verify: bool, device: object
    ) -> dict[str, Any]:
        with self._directory.shared():  # nothing is removed while it is read
            if self._db.checkpoints.get(self._directory.store_id, record.id) is None:
                raise CheckpointNotFoundError(record.id, "it was deleted meanwhile; list_trash() shows it")
            folder = self._directory.folder(record.experiment_id, record.id)
            try:
                manifest, _ = read_manifest(folder, record.manifest_sha256)
            except IntegrityError as error:
                self._note(record.id, error, [])
                raise
            reader = CheckpointReader(folder, manifest, verify)
            try:
                state = reader.load(components, device)
            except IntegrityError as error:
                if not reader.sound:
                    self._note(record.id, error, [])
                raise
            if verify and len(reader.checks) == len(manifest.files):  # a part says nothing of the whole
                self._note(record.id, None, reader.checks)
            return state

    def register_hook(self, *arguments: Any, **options: Any) -> None:
        """Register a hook; takes what ``HookManager.register_hook`` takes, and raises what it raises.

        Raises:
            ConfigurationError: the manager was made with ``enable_hooks=False``.
        """
        self._hooks().register_hook(*arguments, **options)

    def unregister_hook(self, name: str) -> bool:
        """Forget a hook; returns whether it was there."""
        return self._hooks().unregister_hook(name)

    def list_hooks(self, event: HookEvent | None = None) -> list[dict[str, Any]]:
        """Return what is registered, see ``HookManager.list_hooks``."""
        return self._hooks().list_hooks(event)

    def _hooks(self) -> HookManager:
        if self.hook_manager is None:
            raise ConfigurationError("this manager has no hooks; make it with enable_hooks=True")
        return self.hook_manager

    def close(self) -> None:
        """Let go of the database, unless it is the tracker's. Closing twice does nothing."""
        if self._tracker is None:
            self._db.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot copy or pickle a manager; pass checkpoint_dir and experiment_id, and make one there")

    def __enter__(self) -> EnhancedCheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _integers(**values: Any) -> list[int]:
    numbers = []
    for name, value in values.items():
        try:
            number = operator.index(value)
        except TypeError:
            raise UnsupportedValueError(name, value, "it must be an integer") from None
        if not -(2**63) <= number < 2**63:
            raise ConfigurationError(f"{name} {number} does not fit into 64 bits")
        numbers.append(number)
    return numbers
