"""What the importers share: a run as it is brought along, how it is stored, and SQLite files that are only read."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Columns, Point, pack, unpack
from model_checkpoint.database.metrics import grouped
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError, DatabaseError, FormatError
from model_checkpoint.utils.jsonable import short_text, text, to_jsonable

OnRun = Callable[[str], object]

_AT_ONCE = 200_000  # points of one append: some 60 MB of Python objects
_SPACE = uuid.UUID("6f0a7c1e-5d0b-4a86-9a3e-6f6f3c1d2b90")  # of the ids; another one would import everything again


@dataclass(frozen=True)
class ImportedRun:
    """One run of another tool.

    Attributes:
        tool: ``mlflow``, ``tensorboard`` or ``trackio``.
        source: the file or folder that it is read from.
        run_id: what the tool knows it by; with ``tool`` it decides the id of the experiment.
        name, project: as of an ``ExperimentRecord``.
        points: returns its points, in any order; called once, and not at all for a run that is there already.
        parent: the ``run_id`` of the run that it belongs under, or None.
        status: as of an ``ExperimentRecord``.
        created_at, ended_at: Unix seconds; None for the time of its first and last point.
        config, metadata: JSON values by name.
    """

    tool: str
    source: str
    run_id: str
    name: str
    project: str | None
    points: Callable[[], Iterable[Point]]
    parent: str | None = None
    status: str = "completed"
    created_at: float | None = None
    ended_at: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def store_runs(runs: Iterable[ImportedRun], database_url: str, on_run: OnRun | None) -> list[str]:
    """Store runs, each whole or not at all, parents before their children; those that are there stay as they are.

    Args:
        runs: all of one source.
        database_url: see ``EnhancedDatabaseConnection``.
        on_run: called with the name of each run once it is stored.

    Returns:
        The ids of their experiments, in the order of ``runs``; also of those that were there.

    Raises:
        UnsupportedValueError: a text that no database stores, or a name that is too long for this one.
        DatabaseError: the database refused. Runs before the one that failed are stored, and importing again goes on.
        Whatever ``on_run`` raises: the same.
    """
    found = list(runs)
    database = EnhancedDatabaseConnection(database_url)
    with contextlib.closing(database):
        for run in _parents_first(found):
            if database.experiments.get(_id(run.tool, run.run_id)) is None:
                _store(database, run)
            if on_run is not None:
                on_run(run.name)
    return [_id(run.tool, run.run_id) for run in found]


def _id(tool: str, run_id: str) -> str:
    return str(uuid.uuid5(_SPACE, f"{tool}:{run_id}"))


def _parents_first(runs: Sequence[ImportedRun]) -> Iterator[ImportedRun]:
    waiting = {run.run_id: run for run in runs}
    while waiting:
        # Runs that are under one another in a circle are nobody's children.
        ready = [run for run in waiting.values() if run.parent not in waiting] or list(waiting.values())
        yield from ready
        for run in ready:
            del waiting[run.run_id]


def _store(database: EnhancedDatabaseConnection, run: ImportedRun) -> None:
    # The source is read, and its points are sorted and grouped, before the transaction begins: it keeps others out.
    with contextlib.closing(_SortedPoints(run.points())) as points:
        experiment = _record(run, points, database.max_name)
        for name in points.names:
            short_text(name, "metric name", database.max_name)
        with database.transaction(durable=True):
            if database.experiments.get(experiment.id) is not None:
                return  # somebody else imported it meanwhile
            database.experiments.create(experiment)
            for batch in points:
                database.metrics.append(experiment.id, batch)


def _record(run: ImportedRun, points: _SortedPoints, limit: int) -> ExperimentRecord:
    created_at = run.created_at if run.created_at is not None else points.first or 0.0
    ended_at = run.ended_at if run.ended_at is not None else points.last
    imported = {"tool": run.tool, "source": run.source, "id": run.run_id}
    return ExperimentRecord(
        id=_id(run.tool, run.run_id),
        name=text(run.name, "run name"),
        project=None if run.project is None else short_text(run.project, "project", limit),
        parent_id=None if run.parent is None else _id(run.tool, run.parent),
        status=run.status,
        created_at=created_at,
        ended_at=created_at if ended_at is None else ended_at,
        config=to_jsonable(run.config, "config"),
        metadata=to_jsonable({**run.metadata, "imported": imported}, "metadata"),
    )


class _SortedPoints:
    """Batches of points in the order of time and step; those that are equal in both stay in the order given.

    They lie in a temporary file of SQLite's, which sorts there: a run of any length takes a few megabytes of memory.

    Attributes:
        names: of the metrics.
        first, last: Unix seconds of the earliest and the latest point; None where there is none.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self.names: dict[str, int] = {}
        self._db = sqlite3.connect("", isolation_level=None)
        try:
            with _sorting():
                self._db.execute("CREATE TABLE points (name INTEGER, value REAL, step INTEGER, time REAL)")
                self._db.execute("BEGIN")
                numbered = (
                    (self.names.setdefault(name, len(self.names)), value, step, at) for name, value, step, at in points
                )
                self._db.executemany("INSERT INTO points VALUES (?, ?, ?, ?)", numbered)
                self.first, self.last = self._db.execute("SELECT MIN(time), MAX(time) FROM points").fetchone()
                self._db.execute("CREATE TABLE batches (content BLOB)")
                points = self._sorted()
                while batch := list(islice(points, _AT_ONCE)):
                    self._db.execute("INSERT INTO batches VALUES (?)", (pack(grouped(batch)),))
        except BaseException:
            self._db.close()
            raise

    def _sorted(self) -> Iterator[Point]:
        names = list(self.names)
        for name, value, step, at in self._db.execute("SELECT * FROM points ORDER BY time, step, rowid"):
            yield names[name], float("nan") if value is None else value, step, at  # SQLite has no NaN, it is NULL

    def __iter__(self) -> Iterator[dict[str, Columns]]:
        with _sorting():
            for (content,) in self._db.execute("SELECT content FROM batches ORDER BY rowid"):
                yield unpack(content)

    def close(self) -> None:
        """Remove the temporary file."""
        self._db.close()


@contextlib.contextmanager
def _sorting() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(
            f"the points of a run cannot be sorted in a temporary file: {error}; this run was not imported. "
            "Make room there, or name another folder with the variable SQLITE_TMPDIR"
        ) from error


class SQLiteSource:
    """A SQLite file of another tool, which is only read.

    Args:
        path: the file.
        tool: what should have written it, for errors.
        needed: table -> the columns that it must have.
        advice: what to do about a file that has them not.

    Raises:
        ConfigurationError: there is no such file, or it is no database of this tool.
    """

    def __init__(self, path: Path, tool: str, needed: Mapping[str, Sequence[str]], advice: str) -> None:
        if not path.is_file():
            raise ConfigurationError(f"there is no file {path}; name the {tool} database to import from")
        self._path = path
        self._log = Path(f"{path.resolve()}-wal")
        self._had_log = self._log.exists()
        try:
            self._db = _open(path, self._had_log)
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"{path} cannot be read as a SQLite database: {error}; nothing was imported. {advice}"
            ) from error
        try:
            self._check(tool, needed, advice)
        except BaseException:
            self.close()
            raise

    def _check(self, tool: str, needed: Mapping[str, Sequence[str]], advice: str) -> None:
        for table, columns in needed.items():
            missing = [column for column in columns if column not in self.columns(table)]
            if missing:
                what = f"columns {', '.join(missing)} in its table" if self.columns(table) else "table"
                raise ConfigurationError(f"{self._path} is no {tool} database: it has no {what} {table}. {advice}")

    def columns(self, table: str) -> list[str]:
        """Return the names of the columns of a table; none where there is no such table."""
        return [name for (name,) in self.rows("SELECT name FROM pragma_table_info(:table)", {"table": table})]

    def rows(self, sql: str, binds: Mapping[str, Any] | None = None) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a SELECT.

        Raises:
            FormatError: the file is damaged, or somebody holds it locked.
        """
        try:
            yield from self._db.execute(sql, binds or {})
        except sqlite3.Error as error:
            raise FormatError(
                f"{self._path} cannot be read: {error}; the run that was being read was not imported. Check it with "
                "'PRAGMA integrity_check', or import a copy of it"
            ) from error

    def close(self) -> None:
        """Let go of the file, and of what SQLite has put beside it to read it."""
        self._db.close()
        if not self._had_log and self._log.exists():
            # The last connection that may write takes the empty log away; removing it by hand could hit a writer.
            with contextlib.suppress(sqlite3.Error):
                with contextlib.closing(sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=rw", uri=True)) as last:
                    _check(last)


def _open(path: Path, has_log: bool) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        return _connect(uri)
    except sqlite3.OperationalError:
        with open(path, "rb") as content:
            if has_log or content.read(20)[18:20] != b"\2\2":
                raise
    # Reading a file in WAL mode makes a -wal and a -shm beside it, which a folder that cannot be written does not take.
    # Nobody writes to it there either, and it can be read as it is.
    return _connect(f"{uri}&immutable=1")


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # reads the file: is it a database?
