"""The experiment tracker: one run's config, tags, metrics and status."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.metrics import Logged
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    UnsupportedValueError,
)
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.performance.batched_writer import BatchedWriter
from model_checkpoint.tracking.arguments import check_lengths, described
from model_checkpoint.tracking.capture import Capture, at_once, in_force
from model_checkpoint.tracking.closing import Held, status_after
from model_checkpoint.tracking.description import ExperimentDescription
from model_checkpoint.tracking.events import RunEvents, hooks_of
from model_checkpoint.tracking.history import to_columns
from model_checkpoint.tracking.metric_log import MetricLog, replay_left_behind
from model_checkpoint.tracking.recording import Recording
from model_checkpoint.utils.jsonable import short_text, to_number, to_step

log = logging.getLogger(__name__)
_AT_ONCE = 1 << 16  # points of a bulk that make one row for the writer
_BEFORE = HookEvent.BEFORE_METRIC_COLLECTION  # a look into the class takes as long as the look whether anybody listens
STATUSES = ("running", "completed", "failed", "interrupted")


class ExperimentTracker(ExperimentDescription):
    """Tracks one experiment; safe to use from many threads.

    Metrics are buffered: ``log_metric`` returns at once and a thread writes within half a second. Use it in a ``with``
    block, or call ``close``, to end it with a status. What is open at the interpreter's exit is ``completed`` then, or
    after an exception ``failed`` or ``interrupted``; of ``sys.exit(1)`` outside a block nobody knows there. A
    ``multiprocessing`` child must ``flush`` or ``close`` before it ends: such a child does not go through the
    interpreter's exit, and the last half second would be lost.

    Args:
        experiment_name: what this run is called; names need not be unique.
        project_name: the group that it is in.
        tags: a list of JSON values, usually strings.
        config: name -> any JSON value; scalars of NumPy, torch and the like are taken as numbers, tuples as lists.
        database_url: see ``EnhancedDatabaseConnection``.
        parent: the experiment that it belongs under: a tracker or an id.
        metadata: name -> any JSON value.
        capture: what is noted of the code and the machine, see ``captured``; None is everything. It is complete within
            seconds. ``child`` and ``fork_from`` note nothing.
        hook_manager: hooks that are there before it starts; new ones when None.

    Attributes:
        experiment_id: UUID text.
        database: the connection, which a manager made with this tracker shares.
        hook_manager: the hooks of this run, which it shares, too, and so do trackers that ``child`` and ``fork_from``
            make. Events of metrics, thresholds and the database come in a thread of the engine's.

    Raises:
        UnsupportedValueError: a part of config, tags or metadata that cannot be stored; the text names its path.
        ExperimentNotFoundError: there is no such parent.
        ConfigurationError, DatabaseError, FormatVersionError: the database cannot be used.
    """

    def __init__(  # noqa: PLR0913 - what users call; the names are those of the specification
        self,
        experiment_name: str,
        project_name: str | None = None,
        tags: Any = None,
        config: Mapping[str, Any] | None = None,
        database_url: str = "sqlite:///experiments.db",
        *,
        parent: ExperimentTracker | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        capture: Capture | None = None,
        hook_manager: HookManager | None = None,
    ) -> None:
        wanted = in_force(capture)
        experiment = described(experiment_name, project_name, tags, config, metadata)
        parent_id = parent.experiment_id if isinstance(parent, ExperimentTracker) else parent
        found = at_once(wanted) if wanted.stores else None
        self.hook_manager = hooks_of(hook_manager)
        self._begin(EnhancedDatabaseConnection(database_url), replace(experiment, parent_id=parent_id), found)
        self._recording.begin(wanted, found, self._log_system)

    def _begin(
        self,
        database: EnhancedDatabaseConnection,
        experiment: ExperimentRecord,
        captured: Mapping[str, Any] | None = None,
        owned: bool = True,
    ) -> None:
        try:
            check_lengths(database, experiment.tags, experiment.project)
            if experiment.parent_id is not None and database.experiments.get(experiment.parent_id) is None:
                raise ExperimentNotFoundError(f"parent experiment {experiment.parent_id!r} is not in {database!r}")
            database.experiments.create(experiment, captured)
        except BaseException:
            if owned:
                database.close()
            raise
        self._open(database, experiment, owned)
        self._events.started(experiment, resumed=False)

    def child(
        self,
        experiment_name: str,
        *,
        tags: Any = None,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ExperimentTracker:
        """Start an experiment under this one, in its project and on its connection, which stays this one's.

        Args are those of the constructor. When this tracker is closed, the metrics of its children are stored, too; one
        that is used after that cannot store anything.
        """
        return self._start(self.experiment_id, experiment_name, tags, config, metadata)

    def fork_from(
        self,
        checkpoint_id: str,
        experiment_name: str,
        *,
        tags: Any = None,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ExperimentTracker:
        """Start an experiment that goes on from a checkpoint of any experiment of this database, and note which.

        Other arguments are those of ``child``; it has no parent.

        Raises:
            CheckpointNotFoundError: the database has no such checkpoint.
        """
        if self.database.checkpoints.home(checkpoint_id) is None:
            raise CheckpointNotFoundError(checkpoint_id, f"there is none of this id in {self.database!r}")
        return self._start(None, experiment_name, tags, config, metadata, checkpoint_id)

    def _start(
        self,
        parent_id: str | None,
        name: str,
        tags: Any,
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        forked_from: str | None = None,
    ) -> ExperimentTracker:
        made = type(self).__new__(type(self))
        made.hook_manager = self.hook_manager
        experiment = described(name, self.project_name, tags, config, metadata)
        made._begin(self.database, replace(experiment, parent_id=parent_id, forked_from=forked_from), owned=False)
        made._lender = self
        made._held.end_with(self._held)
        return made

    @classmethod
    def resume(
        cls,
        experiment_id: str,
        database_url: str = "sqlite:///experiments.db",
        *,
        at_checkpoint: str | None = None,
        capture: Capture | None = None,
        hook_manager: HookManager | None = None,
    ) -> ExperimentTracker:
        """Go on with an experiment that was started before, here or elsewhere; its status is ``running`` again.

        Args:
            experiment_id: which.
            database_url: see ``EnhancedDatabaseConnection``.
            at_checkpoint: the checkpoint that training goes on from. Metrics that were logged after it was saved become
                an earlier attempt (see ``attempts``), so that no step is there twice; if it is itself from an earlier
                attempt, the metrics up to it come back.
            capture: as for the constructor. The command and the host are added to what was captured at the start, as
                an entry of its list ``resumed``; where nothing was, nothing is.
            hook_manager: as for the constructor.

        Raises:
            ExperimentNotFoundError: it is not in the database.
            ConfigurationError: there is no such database.
            CheckpointNotFoundError: it has no such checkpoint; nothing was changed.
        """
        wanted = in_force(capture).again
        database = EnhancedDatabaseConnection(database_url, create=False)
        try:
            experiment = database.experiments.get(experiment_id)
            if experiment is None:
                raise ExperimentNotFoundError(
                    f"experiment {experiment_id!r} is not in {database!r}; check the id and the URL"
                )
        except BaseException:
            database.close()
            raise
        tracker = cls.__new__(cls)
        tracker.hook_manager = hooks_of(hook_manager)
        tracker._open(database, experiment)
        tracker._events.started(experiment, resumed=True)
        try:
            if at_checkpoint is not None:
                tracker._rewind(at_checkpoint)
            tracker.set_status("running")
        except BaseException:
            tracker._let_go()
            raise
        tracker._recording.begin(wanted, at_once(wanted) if wanted.stores else None, tracker._log_system, resumed=True)
        return tracker

    def _rewind(self, checkpoint_id: str) -> None:
        found = self.database.checkpoints.position(self.experiment_id, checkpoint_id)
        if found is None:
            raise CheckpointNotFoundError(checkpoint_id, f"experiment {self.experiment_id} has none of this id")
        self.database.attempts.go_back(self.experiment_id, checkpoint_id, *found)

    def _open(self, database: EnhancedDatabaseConnection, experiment: ExperimentRecord, owned: bool = True) -> None:
        self.experiment_id = experiment.id
        self.experiment_name = experiment.name
        self.project_name = experiment.project
        self.database = database
        self.version = 0  # grows when config or tags change, so that a manager knows
        self._ended = False
        self._lender: ExperimentTracker | None = None  # whose connection it uses, which has to live as long
        self._names: set[str] = set()  # metric names that were found good
        if not database.in_memory:
            replay_left_behind(database)
        self._events = RunEvents(self.hook_manager, experiment, database)
        if owned:
            database.on_error(self._events.database_failed)
        metrics = MetricLog(database, experiment.id, self._events.collected)
        self._writer: BatchedWriter[Logged] = BatchedWriter(metrics.write)
        metrics.pending = self._writer.pending
        self._tally = metrics.tally
        self.unflushed = self._writer.pending
        self.spooled = metrics.spooled
        self._recording = Recording(database, experiment.id)
        # Also when nobody closes the tracker: at interpreter exit, and when the last reference to it goes.
        self._held = Held(self._recording, self._writer, metrics, database, owned, self._events)
        self._finish = weakref.finalize(self, self._held.let_go_of_abandoned)

    def log_metric(self, name: str, value: Any, step: int | None = None) -> None:
        """Log one value of one metric.

        Args:
            name: the metric. Names that begin with ``system/`` are those of the machine's metrics.
            value: a number or scalar of an array library; NaN and the infinities are kept.
            step: an integer, or None.

        Raises:
            UnsupportedValueError: ``value`` is no single number, ``name`` no text, or ``step`` no 64-bit integer.
        """
        if self._ended:
            raise self._closed()
        if type(name) is not str or name not in self._names:
            self._names.add(short_text(name, "metric name", self.database.max_name))
        if type(value) is not float:
            value = to_number(value, f"metrics.{name}")
        if _BEFORE in self.hook_manager.listening:
            self._events.collecting({name: value}, step)
        self._writer.put((name, value, None if step is None else to_step(step), time.time()))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the values of several metrics at one step; see ``log_metric``. Either all or none are logged."""
        if self._ended:
            raise self._closed()
        if not isinstance(metrics, Mapping):
            raise UnsupportedValueError("metrics", metrics, "it must be a dict of names and numbers")
        at = time.time()
        where = None if step is None else to_step(step)
        for name in metrics:
            if name not in self._names:
                self._names.add(short_text(name, "metric name", self.database.max_name))
        points = [
            (name, value if type(value) is float else to_number(value, f"metrics.{name}"), where, at)
            for name, value in metrics.items()
        ]
        if _BEFORE in self.hook_manager.listening:
            self._events.collecting({name: value for name, value, *_ in points}, where)
        self._writer.extend(points)

    def log_arrays(self, name: str, values: Any, steps: Any = None) -> None:
        """Log many values of one metric at once.

        Args:
            name: the metric.
            values: a sequence or one-dimensional array of numbers, NumPy's and torch's too; it is copied.
            steps: as many integers, or None.

        Raises:
            UnsupportedValueError: they are not, or differ in number; none of them is logged.
        """
        if self._ended:
            raise self._closed()
        columns = to_columns(values, steps, time.time(), f"metrics.{name}")
        self._names.add(short_text(name, "metric name", self.database.max_name))
        if _BEFORE in self.hook_manager.listening:
            self._events.collecting({name: columns.values.tolist()}, None)
        for start in range(0, len(columns), _AT_ONCE):
            self._writer.put((name, columns[start : start + _AT_ONCE]))

    def watch_metric(self, name: str, *, above: float | None = None, below: float | None = None) -> None:
        """Fire ON_METRIC_THRESHOLD when values of a metric go beyond a threshold, once until one is within again.

        Args:
            name: the metric. It is looked at when its points are stored, within half a second.
            above, below: the thresholds; at least one. NaN is beyond any.

        Raises:
            ConfigurationError: no threshold is given, or one is no number.
        """
        self._events.watch(name, above, below)

    def _log_system(self, sample: Mapping[str, float]) -> None:
        at = time.time()
        self._writer.extend([(name, float(value), None, at) for name, value in sample.items()])

    def _closed(self) -> DatabaseError:
        return DatabaseError(
            f"tracker of {self.experiment_name!r} was closed; ExperimentTracker.resume() goes on with it"
        )

    def set_status(self, status: str) -> None:
        """Set the status: ``running``, ``completed``, ``failed`` or ``interrupted``.

        Raises:
            ConfigurationError: it is none of these.
        """
        if status not in STATUSES:
            raise ConfigurationError(f"status {status!r} is unknown; use one of {', '.join(STATUSES)}")
        self.database.experiments.set_status(self.experiment_id, status)
        self._held.status = None if status == "running" else status
        self._events.status_changed(status)

    def get_performance_statistics(self) -> dict[str, float]:
        """Return what this tracker did, in this process.

        Returns:
            ``flushes``, ``points`` (stored), ``flush_seconds``; of the newest 1,000 batches ``flush_p50_seconds``,
            ``flush_p95_seconds`` and ``flush_p99_seconds``; ``spooled`` (batches that the database did not take at
            once); ``buffered_points``. What did not happen yet is left out.
        """
        return self._tally.summary() | self._tally.gauged()

    def flush(self) -> None:
        """Write every buffered metric: to the database, or while it is away to a local file that it gets later.

        Raises:
            DatabaseError: neither took them; they are kept in memory. Or this is inside a transaction of this thread,
                for whose end the flush would wait.
        """
        if self.unflushed and self.database.inside_transaction():
            raise DatabaseError(f"{self!r}: metrics cannot be stored inside a transaction; leave it first")
        self._writer.flush()

    def close(self, status: str = "completed") -> None:
        """Write what is buffered, set the final status and let go of the database. Closing twice does nothing.

        Raises:
            ConfigurationError: the status is unknown.
            DatabaseError: the database refused; the metrics are kept and ``close`` can be called again.
        """
        if not self._ended:
            self.flush()
            self.set_status(status)
            self._let_go()

    def _let_go(self) -> None:
        self._ended = True
        try:
            self._events.ended()
        finally:
            self._finish.detach()
            self._held.let_go()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot copy or pickle a tracker; pass experiment_id, and use ExperimentTracker.resume() there")

    def __enter__(self) -> ExperimentTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._ended:
            return
        status = status_after(error)
        self.flush()
        try:
            self.set_status(status)
        except DatabaseError as problem:  # what was trained and logged is there; the training's end is not its failure
            log.warning("%r ended as %s, which the database could not note: %s", self, status, problem)
        self._let_go()

    def __repr__(self) -> str:
        return f"ExperimentTracker({self.experiment_name!r}, experiment_id={self.experiment_id!r})"
