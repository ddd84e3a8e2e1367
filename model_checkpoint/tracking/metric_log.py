"""From what was logged to the database: batches, each stored exactly once, by way of a local file while it is away."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Columns, pack, unpack
from model_checkpoint.database.metrics import Logged, grouped
from model_checkpoint.errors import DatabaseError
from model_checkpoint.performance.spool import Spool
from model_checkpoint.performance.statistics import Tally
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.overdue import Overdue

log = logging.getLogger(__name__)
Collected = Callable[[Mapping[str, Columns], bool], object]
_overdue = Overdue(0.5)  # seconds that the database has for a batch before the spool has it, too
_WORK = 2e-6  # seconds a point that storing a batch may take before it counts as waiting
_SHORT = 1.0  # seconds; an error that took longer to come was one of waiting, and would take as long again
_LONGEST_PAUSE = 30.0  # seconds between two tries of a database that is away


class MetricLog:
    """Writes the batches of one experiment and one process.

    A batch that the database refuses goes to a spool. So does one that it has not taken after half a second, while it
    is still tried, and with it what was logged since: a process that is killed then loses no more than one that is
    killed at any other time. What is spooled is stored before anything later is, in order. The database knows the
    number of the last batch of every writer, so that nothing is stored twice: not when a connection broke at the
    commit, and not when a spool could not be removed.

    Args:
        database: where to.
        experiment_id: whose metrics these are.
        collected: called with each batch that is safe, and whether by the spool; must neither wait nor raise.

    Attributes:
        pending: what waits to be written; whoever collects it sets it. What is spooled from behind a batch that waits
            is taken out of it.
        spooled: points of each batch in the spool; always the same list.
        tally: what was stored, and how long it took.
    """

    def __init__(self, database: EnhancedDatabaseConnection, experiment_id: str, collected: Collected) -> None:
        self._database = database
        self._collected = collected
        self._experiment_id = experiment_id
        self.pending: list[Logged] = []
        self.spooled: list[int] = []
        self.tally = Tally(self, {"buffered_points": lambda log: sum(map(_points, tuple(log.pending)))})
        self._start_afresh()
        watch(self)

    def _start_afresh(self) -> None:
        self._writer = str(uuid.uuid4())
        self._number = 1  # of the batch that is written, or will be next
        self._keeping = threading.Lock()  # around what the next three and the spool say together
        self._kept = 0  # the number of the last batch that went to the spool
        self._aside: list[int] = []  # the numbers of ``spooled``
        self.spooled.clear()
        self._away = False
        self._spool = Spool(_folder(self._database) / f"{_prefix(self._database)}{self._experiment_id}.{self._writer}")
        self._next_try = 0.0
        self._pause = 1.0

    def before_fork(self) -> None:
        """Nothing: no batch is being written then."""

    def after_fork_in_parent(self) -> None:
        """Nothing was changed."""

    def after_fork_in_child(self) -> None:
        """Be a writer of its own: the parent's number and spool are the parent's."""
        self._spool.close()
        self._start_afresh()

    def write(self, logged: Sequence[Logged], urgent: bool = False) -> None:
        """Store a batch, in the database or the spool.

        Args:
            logged: what was logged, in order: the first part of ``pending``. After an error, the same once more.
            urgent: whether the database is tried although it was away a moment ago.

        Raises:
            DatabaseError: neither took it; nothing of it was stored.
        """
        batch = grouped(logged)
        started = time.perf_counter()
        try:
            with self._watched(batch, len(logged)):
                self._store(batch, urgent)
        except DatabaseError as error:
            if batch:
                self._put_aside(batch, error)
                self._collected(batch, True)
                if urgent and time.perf_counter() - started < _SHORT:
                    self._try_again(len(logged))
        else:
            if batch:
                points, took = sum(map(len, batch.values())), time.perf_counter() - started
                self.tally.count(self._experiment_id, flushes=1, points=points, flush_seconds=took)
                self._collected(batch, False)
            self._forget(self._number)
            if self._spool:  # what came while this batch waited
                self._try_again(len(logged))
        self._number = self._next()

    def _try_again(self, count: int) -> None:
        """Store what is spooled, if the connection only broke: a save that waits notes where the metrics stand.

        Args:
            count: of ``pending``, those that were taken care of.
        """
        self._number = self._next()
        try:
            with self._watched({}, count):
                self._store({}, urgent=True)
        except DatabaseError as error:
            log.debug("%r is still away: %s", self._database, error)

    def _store(self, batch: Mapping[str, Columns], urgent: bool) -> None:
        if self._spool and time.monotonic() < self._next_try and not urgent:
            raise DatabaseError(f"{self._database!r} was away a moment ago")
        try:
            if self._spool:
                stored = _replay(self._database, self._experiment_id, self._writer, self._spool)
                self.tally.count(self._experiment_id, points=self._forget(stored))
            if batch:
                self._database.metrics.append(self._experiment_id, batch, (self._writer, self._number))
            self._pause = 1.0
        except DatabaseError:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._next_try = time.monotonic() + self._pause
            raise

    def _forget(self, stored: int) -> int:
        """Note that the database has every batch up to this number; returns how many points of them were spooled."""
        with self._keeping:
            count = bisect_right(self._aside, stored)
            points = sum(self.spooled[:count])
            del self._aside[:count], self.spooled[:count]
            if self._spool and self._kept <= stored:
                _remove(self._spool)
                if self._away:
                    log.warning("the database has the metrics of %s again, everything is stored", self._spool.path)
                self._away = False
        return points

    def _watched(self, batch: Mapping[str, Columns], count: int) -> AbstractContextManager[None]:
        if self._database.in_memory or not (batch or self._spool):
            return nullcontext()
        due = time.monotonic() + _WORK * sum(map(len, batch.values()))
        return _overdue.otherwise(partial(self._put_aside_meanwhile, batch, count, due))

    def _put_aside(self, batch: Mapping[str, Columns], error: DatabaseError) -> None:
        if self._database.in_memory:
            raise error  # another process could not store it later
        path = self._spool.path
        if not self._away:
            log.warning("metrics go to %s until the database takes them: %s", path, error)
        try:
            with self._keeping:
                self._keep(batch)
                place = bisect_right(self._aside, self._number)
                self._aside.insert(place, self._number)
                self.spooled.insert(place, sum(map(len, batch.values())))
        except OSError as problem:
            raise DatabaseError(f"{error}; {path} cannot take it either ({problem}), it stays in memory") from error
        self._away = True
        self.tally.count(self._experiment_id, spooled=1)

    def _put_aside_meanwhile(self, batch: Mapping[str, Columns], count: int, due: float) -> None:
        """Put a batch aside that waits, and what was logged since: all of ``pending`` but its first ``count``."""
        if time.monotonic() < due:  # it need not be waiting, so much work it is
            return
        try:
            with self._keeping:
                if batch:
                    self._keep(batch)
                rows = self.pending[count:]
                if rows:
                    later = grouped(rows)
                    number = self._next()
                    self._spool.append(number, pack(later))
                    self._kept = number
                    self._aside.append(self._kept)
                    self.spooled.append(sum(map(len, later.values())))
                    del self.pending[count : count + len(rows)]
                    self._collected(later, True)
        except OSError as error:
            log.warning("the database takes long, and %s does not take metrics meanwhile: %s", self._spool.path, error)

    def _next(self) -> int:
        """Return a number above all that were used: a lower one would be taken for a batch that is stored."""
        return max(self._number, self._kept) + 1

    def _keep(self, batch: Mapping[str, Columns]) -> None:
        if self._kept < self._number:
            self._spool.append(self._number, pack(batch))
            self._kept = self._number

    def close(self) -> None:
        """Let go of the spool; what is in it is stored by the next tracker that opens this database."""
        self._spool.close()


def replay_left_behind(database: EnhancedDatabaseConnection) -> None:
    """Store what processes that are gone have spooled for this database on this machine; leaves what it refuses."""
    for path in _left_behind(database):
        try:
            spool = Spool(path, take_over=True)
        except OSError:
            continue  # its writer lives, or somebody else replays it now
        try:
            experiment_id, _, writer = path.name.removeprefix(_prefix(database)).partition(".")
            _replay(database, experiment_id, writer, spool)
            _remove(spool)
        except (DatabaseError, ValueError) as error:
            log.warning("%s was left behind and cannot be stored, it stays until somebody removes it: %s", path, error)
        finally:
            spool.close()


def _replay(database: EnhancedDatabaseConnection, experiment_id: str, writer: str, spool: Spool) -> int:
    """Store what is in a spool; returns the number of its last batch."""
    number = 0
    for number, record in spool.records():
        database.metrics.append(experiment_id, unpack(record), (writer, number))
    return number


def _remove(spool: Spool) -> None:
    try:
        spool.clear()
    except OSError as error:  # what is stored is not stored again
        log.warning("the database has the metrics of %s, which cannot be removed: %s", spool.path, error)


def _left_behind(database: EnhancedDatabaseConnection) -> Iterator[Path]:
    folder = _folder(database)
    return folder.glob(f"{_prefix(database)}*") if folder.is_dir() else iter(())


def _points(logged: Logged) -> int:
    return len(logged[1]) if isinstance(logged[1], Columns) else 1


def _prefix(database: EnhancedDatabaseConnection) -> str:
    return hashlib.sha256(database.place.encode()).hexdigest()[:16] + "."


def _folder(database: EnhancedDatabaseConnection) -> Path:
    """Return where metrics wait for a database: beside its file, or in the user's folder for such things.

    A user who has no folder of his own, as in some containers, gets one for temporary files.
    """
    if "://" not in database.place:
        return Path(f"{database.place}-spool")
    home = os.path.expanduser("~")
    places = [os.path.join(home, ".local", "state")] * (home != "~")
    places = [os.environ["XDG_STATE_HOME"]] if os.environ.get("XDG_STATE_HOME") else places
    for base in (*places, os.path.join(tempfile.gettempdir(), f"state-{os.getuid()}")):
        folder = Path(base) / "model_checkpoint" / "spool"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.R_OK | os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return folder  # what is written there says why it cannot be
