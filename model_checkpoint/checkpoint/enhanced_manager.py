"""The checkpoint manager and its save path, readable here from top to bottom."""

from __future__ import annotations

import logging
import operator
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from model_checkpoint.checkpoint.arguments import (
    check_at_least_one,
    check_constructor,
    check_flags,
    integers,
    label,
    numbers,
)
from model_checkpoint.checkpoint.background import SaveQueue
from model_checkpoint.checkpoint.best import check_overrides, flags_taken
from model_checkpoint.checkpoint.calls import SaveCall
from model_checkpoint.checkpoint.catalog import GAUGES, Tracker, database_of
from model_checkpoint.checkpoint.compression import best_codec
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.checkpoint.events import AFTER_SAVE, hooks_of, payload
from model_checkpoint.checkpoint.lifecycle import ManagerLifecycle
from model_checkpoint.checkpoint.preemption import SignalWatch
from model_checkpoint.checkpoint.reader import STATE_FILE
from model_checkpoint.checkpoint.retention import Protection, RetentionPolicy
from model_checkpoint.checkpoint.state import EncodedState, encode, to_json
from model_checkpoint.checkpoint.storage import LinkedFile, PlannedFile
from model_checkpoint.checkpoint.storage import storage_backend as find_backend
from model_checkpoint.database.checkpoints import details_of
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ExperimentNotFoundError
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.integrity.manifest import FileEntry, Manifest
from model_checkpoint.performance import LRUCache
from model_checkpoint.performance.statistics import Tally
from model_checkpoint.utils.jsonable import escape, text, to_jsonable, to_number
from model_checkpoint.utils.parallel import default_threads

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["EnhancedCheckpointManager"]

log = logging.getLogger(__name__)

_COMPONENTS = ("model", "optimizer", "scheduler", "extra")
_FLAGS = ("save_optimizer", "save_scheduler", "compute_checksum", "update_best", "save_rng", "blocking")
_BLOCKING = (bool, type(None))


class EnhancedCheckpointManager(ManagerLifecycle):
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
        enable_hooks: without, the attribute ``hook_manager`` is None.
        best_metrics: metric name -> ``min`` or ``max`` where the name does not tell; the first is ``best_metric``.
        protected_types: checkpoint types that are never removed.
        retention_policy: replaces ``max_checkpoints`` and ``save_frequency``: ``KeepLast(3) | KeepBest(2, "f1")``.
        max_shard_size: bytes of array data above which a file is split; when None, large ones are split into about 8
            parts of at least 256 MiB, which are written at the same time.
        async_save: whether saves return as soon as the state is copied; ``blocking`` of a save overrides it.
        max_pending_saves: background saves that may be under way, each with a copy of the state; a further one waits.
        io_threads: how many threads hash, write, read and copy at once; one a core, up to 16, when None.
        hook_manager: hooks that there are already when it opens the directory; the tracker's when None, which all of
            the tracker's managers share.

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
        max_shard_size: int | None = None,
        async_save: bool = False,
        max_pending_saves: int = 1,
        io_threads: int | None = None,
        hook_manager: HookManager | None = None,
    ) -> None:
        check_constructor(experiment_tracker, retention_policy, protected_types, best_metrics)
        check_at_least_one(save_frequency=save_frequency, max_checkpoints=max_checkpoints, io_threads=io_threads)
        check_at_least_one(max_shard_size=max_shard_size, cache_size=cache_size, max_pending_saves=max_pending_saves)
        check_flags(enable_compression=enable_compression, enable_integrity_checks=enable_integrity_checks)
        check_flags(enable_caching=enable_caching, save_best=save_best, save_last=save_last, enable_hooks=enable_hooks)
        check_flags(async_save=async_save)
        self.checkpoint_dir = "checkpoints" if checkpoint_dir is None else checkpoint_dir
        self.hook_manager = hooks_of(experiment_tracker, hook_manager, enable_hooks)
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
        self._async = async_save
        self._threads = default_threads() if io_threads is None else io_threads
        self._queue = SaveQueue(max_pending_saves)
        self._signals: SignalWatch | None = None
        self._at_signal: Callable[[], Mapping[str, Any]] = dict
        self._tally = Tally(self, GAUGES)
        self._directory = CheckpointDirectory(self.checkpoint_dir)
        self._db = database_of(experiment_tracker, database_url)
        self._db.before_close(self._queue.wait, saves=True)
        self._begin()

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
        save_rng: bool = True,
        blocking: bool | None = None,
    ) -> str:
        """Save a checkpoint; when this returns, it survives a crash of the process, the machine and the power.

        With ``blocking=False``, or ``async_save=True`` of the manager, it returns as soon as the state is copied: the
        checkpoint holds what it was then. It is durable when ``wait`` returns; checkpoints are committed in the order
        of the calls. A failure is raised by the next save or load, by ``wait`` and by ``close``. Closing the manager,
        the interpreter's end and, once the main thread has saved in the background, SIGTERM finish what is pending.

        Args:
            model, optimizer, scheduler: whatever ``restore`` can fill: objects of the frameworks, or nested dicts,
                lists and tuples of such, arrays and plain values. They must not be changed until this returns.
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
            extra_state: whatever else training needs to go on, such as data loaders; same forms as ``model``.
            save_rng: whether to note the random states of Python, NumPy, PyTorch and TensorFlow, for ``restore``.
            blocking: whether to wait until it is durable; None for what the manager's ``async_save`` says.

        Returns:
            The checkpoint's id, a UUID of 36 characters.

        Raises:
            ExperimentNotFoundError: no experiment is named, or it is not in the database.
            UnsupportedValueError: a value that cannot be stored without pickle; the text names its path.
            ConfigurationError: a flag, label or number that cannot be used.
            HookVetoError: a BEFORE hook stopped it.
            StorageError: the disk is full or refused; earlier checkpoints are untouched.
            DatabaseError: the database refused; the next manager on this directory finds what was published.
            SaveFailedError: an earlier save in the background failed; nothing of this one was saved.
            Preempted: a signal came that ``save_on_signal`` watches for; this checkpoint is durable.
        """
        started = time.perf_counter()
        if type(epoch) is not int or type(step) is not int or (epoch | step) >> 63:  # what is plain needs no check
            epoch, step = integers(epoch=epoch, step=step)
        flags = (save_optimizer, save_scheduler, compute_checksum, update_best, save_rng)
        if {*map(type, flags)} != {bool} or type(blocking) not in _BLOCKING:
            check_flags(**dict(zip(_FLAGS, (*flags, blocking))))
        background = (self._async if blocking is None else not blocking) and not self._queue.is_worker()
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
            update_best=bool(update_best),
        )
        if self._queue.jobs or self._queue.failures:
            self._take_turn(background)
        wanted = (model, optimizer if save_optimizer else None, scheduler if save_scheduler else None, extra_state)
        state, details = encode(dict(zip(_COMPONENTS, wanted)), save_rng), details_of(record)
        if self.hook_manager is not None and HookEvent.BEFORE_CHECKPOINT_SAVE in self.hook_manager.listening:
            self._fire(HookEvent.BEFORE_CHECKPOINT_SAVE, payload(record), record.id, record.experiment_id)
        known = self._experiments[record.experiment_id][1]
        call = SaveCall(record, details, known, compute_checksum and self._integrity, started)
        if background:
            self._submit(call, state)
        else:
            if self._queue.jobs:  # of a hook, or of another thread
                self._take_turn(background)
            self._save(call, state)
        if self._signals is not None or self._interrupt is not None:
            self._after_save(record.id)
        return record.id

    def _take_turn(self, background: bool) -> None:
        """Wait until there is room for a save in the background, for another one until nothing is pending.

        This comes before the state is looked at: then arrays of devices are copied to the host, which takes memory.

        Raises:
            SaveFailedError: an earlier save failed, and this one is not the last one before the end.
        """
        if background:
            self._queue.wait_for_room()
        else:
            self._queue.wait()
        if not self._must_save():  # asked after the wait: the signal may have come meanwhile
            self._queue.raise_failure()

    def _submit(self, call: SaveCall, state: EncodedState) -> None:
        """Copy the state and hand it to the background."""
        behind = 0
        if self._tracker is not None and (self._tracker.unflushed or self._tracker.spooled):
            self._tracker.flush()
            behind = sum(self._tracker.spooled)
        stall: list[float] = []
        call = call._replace(position=self._db.experiments.position(call.record.experiment_id) + behind, stall=stall)
        self._queue.submit(call.record.id, lambda buffer: buffer.take(state, self._threads), partial(self._save, call))
        stall.append(time.perf_counter() - call.started)
        self._tally.count(call.record.experiment_id, stall_seconds=stall[0])

    def _save(
        self, call: SaveCall, state: EncodedState, files: Sequence[PlannedFile | LinkedFile] | None = None
    ) -> None:
        """Make a checkpoint of a state that does not change meanwhile, in whatever thread.

        With ``files``, they hold its arrays already.
        """
        record, saved = call.record, None
        started = time.perf_counter()
        hooks = self.hook_manager
        try:
            tree = to_json(state.tree).encode()
            planned: list[PlannedFile | LinkedFile] = [] if files is None else [*files]
            if files is None:
                planned += self._backend.plan(state, self._max_shard_size)
            planned.append(PlannedFile(STATE_FILE, None, len(tree), operator.methodcaller("write", tree)))
            if self._tracker is not None and (self._tracker.unflushed or self._tracker.spooled):
                self._tracker.flush()  # so that the row notes where the metrics stand
            try:
                with self._directory.shared():
                    saved = self._write(call, planned)
            except OSError:
                if saved is None:
                    raise
                log.exception("the lock of %s was not closed well; what it was held for is done", self.checkpoint_dir)
        except (Exception, SystemExit) as error:
            self._tell_failed(record, error)
            raise
        record, taken, count = saved
        key = record.experiment_id
        with self._tally.lock:  # what Tally.count does, without a call
            for name, value in (
                ("saves", 1),
                ("bytes_written", record.size),
                ("save_seconds", time.perf_counter() - started),
            ):
                self._tally.sums[key, name] += value
            self._tally.laps[key, "save_seconds"].append(value)
            self._tally.counts[key, "save_seconds"] += 1
        if hooks is not None and not AFTER_SAVE.isdisjoint(hooks.listening):
            self._tell_saved(record, taken, call.stall[0] if call.stall else time.perf_counter() - call.started)
        advised = hooks is not None and HookEvent.BEFORE_RETENTION in hooks.listening
        excess = self._max_checkpoints is not None and count > self._max_checkpoints
        if excess or advised or self._policy is not None:
            self._retain(record.experiment_id)

    def _write(
        self, call: SaveCall, planned: Sequence[PlannedFile | LinkedFile]
    ) -> tuple[CheckpointRecord, Mapping[str, float], int]:
        """Intent, bytes, manifest, publication, commit; returns record, flags taken, and how many there are now."""
        record, store, rows = call.record, self._directory.store_id, self._db.checkpoints
        behind = 0 if self._tracker is None else sum(self._tracker.spooled)
        sequence = rows.begin(record, call.details, store, call.position, behind)
        try:
            manifest_of = partial(_manifest, call, sequence)
            entries, digest = self._directory.write(
                record.experiment_id,
                record.id,
                planned,
                manifest_of,
                codec=self._codec,
                hashed=call.hashed,
                threads=self._threads,
            )
        except BaseException:
            self._give_up(record.id)
            raise
        record = replace(record, size=sum(map(operator.attrgetter("size"), entries)), manifest_sha256=digest)
        files = map(operator.attrgetter("name", "size", "sha256"), entries)
        decide = partial(flags_taken, overrides=self._best_metrics)
        return (record, *rows.commit(record, store, files, decide))

    def _experiment_to_save(self, experiment_id: str | None) -> str:
        """Return the experiment's id, after noting what manifests tell of it."""
        tracker = self._tracker
        if experiment_id is None and tracker is not None:
            experiment_id = tracker.experiment_id
        if experiment_id is None:
            raise ExperimentNotFoundError(
                "No experiment_id provided and the manager has no experiment_tracker; pass one of them"
            )
        if not isinstance(experiment_id, str):
            raise self._no_experiment(experiment_id)
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


def _manifest(call: SaveCall, sequence: int, entries: Sequence[FileEntry]) -> tuple[bytes, str]:
    record = call.record
    return Manifest(
        record.id, record.created_at, record.backend, sequence, call.experiment, call.details, tuple(entries)
    ).to_bytes()
