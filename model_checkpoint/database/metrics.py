"""Metrics: their series, blocks of points and summaries. The SQL and nothing else."""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from model_checkpoint.database.columns import MAX_POINTS, Columns, Point, decode
from model_checkpoint.errors import DatabaseError
from model_checkpoint.utils.jsonable import LARGEST, exact, storable

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection
    from model_checkpoint.database.schema import Executes

Logged = Point | tuple[str, Columns]  # what a writer collects: one point, or many of one metric

SYSTEM = "system/"  # begins the names of system metrics, which are shown to those only who ask for them
_OPEN_BELOW = 512  # points; a block with fewer is read and written again when more come, one with more is closed
_NAMES_AT_ONCE = 500  # of a statement; SQLite takes 32,766 binds, some servers fewer


class Summary(NamedTuple):
    """What is known of a series without reading it.

    Attributes:
        points: how many were logged.
        numbers: how many of them are not NaN.
        total: the sum of those.
        last, last_step: the last point; NaN is None.
        low, low_step, high, high_step: the smallest and the largest number and the step of the first that has it.
    """

    points: int = 0
    numbers: int = 0
    total: float = 0.0
    last: float | None = None
    last_step: int | None = None
    low: float | None = None
    low_step: int | None = None
    high: float | None = None
    high_step: int | None = None

    def plus(self, more: Columns) -> Summary:
        """Return the summary with ``more`` points behind those that it is of."""
        low, low_step, high, high_step = self[5:]
        for index in more.extremes():
            value = _or_none(more.values[index])
            if value is not None and (low is None or value < low):
                low, low_step = value, more.step(index)
            if value is not None and (high is None or value > high):
                high, high_step = value, more.step(index)
        present = more.values.tolist()
        more_total = sum(present)
        if more_total != more_total:  # a NaN, or infinities of both signs
            present = [value for value in present if value == value]
            more_total = sum(present)
        return Summary(
            self.points + len(more),
            self.numbers + len(present),
            _or_none(self.total + more_total) or 0.0,
            _or_none(more.values[-1]),
            more.step(-1),
            low,
            low_step,
            high,
            high_step,
        )

    def told(self) -> dict[str, Any]:
        """Return it as users see it."""
        both = self.low is not None and -self.low == self.high == LARGEST  # infinities, whose sum is no number
        mean = math.nan if both else (exact(self.total) or 0.0) / max(1, self.numbers)
        return {
            "points": self.points,
            "last": exact(self.last),
            "last_step": self.last_step,
            "min": exact(self.low),
            "min_step": self.low_step,
            "max": exact(self.high),
            "max_step": self.high_step,
            "mean": mean if self.numbers else None,
        }


_SUMMARY = ", ".join(Summary._fields)
_SET_SUMMARY = ", ".join(f"{name} = :{name}" for name in Summary._fields)


class MetricTable:
    """The tables of metrics.

    Args:
        db: the database that they are in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def append(self, experiment_id: str, batch: Mapping[str, Columns], writer: tuple[str, int] | None = None) -> None:
        """Store points behind those of the experiment, in one transaction and in their order.

        Args:
            experiment_id: whose they are.
            batch: name -> points, with positions that count from 0.
            writer: who writes and the number of this batch, which grows. A batch that is stored already, because an
                earlier try failed after it was committed, is not stored twice.

        Raises:
            DatabaseError: the database refused, or has no such experiment; nothing was stored.
        """
        count = sum(map(len, batch.values()))
        with self._db.transaction(alone=False) as connection:
            # Whoever else writes to this experiment waits here; a retry, for a commit that the server still works on.
            connection.execute("UPDATE experiments SET points = points WHERE id = :id", {"id": experiment_id})
            if writer and not _is_new(connection, *writer):
                return
            bind = {"id": experiment_id, "n": count}
            if not connection.execute("UPDATE experiments SET points = points + :n WHERE id = :id", bind).rowcount:
                raise DatabaseError(f"experiment {experiment_id} is not in {self._db!r}; its metrics cannot be stored")
            (end,) = connection.execute("SELECT points FROM experiments WHERE id = :id", bind).fetchone()
            placed = {name: columns.moved(end - count) for name, columns in batch.items()}
            add_points(connection, self.series(connection, experiment_id, list(batch)), placed)

    def series(self, connection: Executes, experiment_id: str, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """Return name -> (id, open block, the fields of a Summary) of series, made where they are missing."""
        found = {row[0]: row[1:] for row in self._rows(connection, experiment_id, names)}
        missing = [name for name in names if name not in found]
        if missing:
            connection.executemany(
                "INSERT INTO series (experiment_id, name) VALUES (:id, :name)",
                [{"id": experiment_id, "name": name} for name in missing],
            )
            found |= {row[0]: row[1:] for row in self._rows(connection, experiment_id, missing)}
        return found

    def _rows(self, connection: Executes, experiment_id: str, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(names), _NAMES_AT_ONCE):
            some = names[start : start + _NAMES_AT_ONCE]
            binds = {f"n{i}": name for i, name in enumerate(some)}
            yield from connection.execute(
                f"SELECT name, id, open_block, {_SUMMARY} FROM series WHERE experiment_id = :id AND attempt = 0 "
                f"AND name IN ({', '.join(f':{bind}' for bind in binds)})",
                {"id": experiment_id, **binds},
            )

    def names(self, experiment_id: str, attempt: int = 0) -> dict[str, int]:
        """Return name -> series id of the metrics of an experiment, in the order in which they were first logged."""
        return dict(
            self._db.query(
                "SELECT name, id FROM series WHERE experiment_id = :id AND attempt = :attempt ORDER BY id",
                {"id": experiment_id, "attempt": attempt},
            )
        )

    def summaries(self, experiment_id: str, attempt: int = 0, system: bool = False) -> dict[str, Summary]:
        """Return name -> summary of every metric of an experiment, with ``system`` those of the machine, too."""
        rows = self._db.query(
            f"SELECT name, {_SUMMARY} FROM series WHERE experiment_id = :id AND attempt = :attempt ORDER BY id",
            {"id": experiment_id, "attempt": attempt},
        )
        return {name: Summary(*summary) for name, *summary in rows if system or not _is_system(name)}

    def columns(self, series_id: int) -> Columns:
        """Return every point of a series."""
        return _joined(self._db.query(_ALL, {"id": series_id}, binary=True), series_id)

    def curve(self, series_id: int, max_points: int) -> Columns:
        """Return at most ``max_points`` points of a series, in which its peaks survive.

        Its first and last point, and of as many stretches of equal length as fit the lowest and the highest one. Long
        series are not read for it: blocks know their peaks.
        """
        ((points, blocks),) = self._db.query(
            "SELECT COALESCE(SUM(points), 0), COUNT(*) FROM blocks WHERE series_id = :id", {"id": series_id}
        )
        stretches = max(1, (max_points - 2) // 2)
        if points <= max_points or blocks < 2 * stretches:
            columns = self.columns(series_id)
            if len(columns) <= max_points:
                return columns
            return _thinned(columns, range(len(columns) + 1), stretches)
        rows = self._db.query(
            "SELECT points, peaks FROM blocks WHERE series_id = :id ORDER BY first_position",
            {"id": series_id},
            binary=True,
        )
        columns = self._edge(series_id, "ASC")[:1]
        columns.extend(Columns.of_peaks(peaks for _, peaks in rows))
        columns.extend(self._edge(series_id, "DESC")[-1:])
        # Each block has two points here; they count as many as they stand for.
        halves = [half for points, _ in rows for half in (points // 2, points - points // 2)]
        places = [0, 0, *accumulate(halves), sum(halves)]
        found = _thinned(columns, places, stretches)
        # The first and the last point may be peaks of their blocks.
        return found.pick([i for i, at in enumerate(found.positions) if not i or at != found.positions[i - 1]])

    def _edge(self, series_id: int, order: str) -> Columns:
        sql = f"SELECT data FROM blocks WHERE series_id = :id ORDER BY first_position {order} LIMIT 1"
        ((data,),) = self._db.query(sql, {"id": series_id}, binary=True)
        return _decoded(data, series_id)

    def points(self, experiment_id: str, name: str | None = None) -> list[Point]:
        """Return the points in the order logged, of one metric or of all but those of the machine."""
        series = self.names(experiment_id)
        wanted = {each: id for each, id in series.items() if each == name or (name is None and not _is_system(each))}
        found: list[tuple[int, Point]] = []
        for each, series_id in wanted.items():
            columns = self.columns(series_id)
            steps = columns.all_steps()
            points = zip([each] * len(columns), columns.values, steps, columns.times)
            found += zip(columns.positions, points)
        if len(wanted) > 1:
            found.sort(key=lambda pair: pair[0])
        return [point for _, point in found]


def _is_system(name: str) -> bool:
    return name.startswith(SYSTEM)


def add_points(connection: Executes, series: Mapping[str, tuple[Any, ...]], batch: Mapping[str, Columns]) -> None:
    """Store columns behind those of their series: ``series`` is name -> (id, open block, the fields of a Summary)."""
    changes, blocks, stale = [], [], []
    for name, columns in batch.items():
        series_id, opened, *summary = series[name]
        change = Summary(*summary).plus(columns)._asdict() | {"id": series_id}
        if opened is not None:
            stale.append({"id": series_id, "first": opened})
            block = _block(connection, series_id, opened)
            block.extend(columns)
            columns = block
        made = [columns[start : start + MAX_POINTS] for start in range(0, len(columns), MAX_POINTS)]
        change["open"] = made[-1].positions[0] if len(made[-1]) < _OPEN_BELOW else None
        changes.append(change)
        blocks += [(series_id, *_row(block)) for block in made]
    connection.executemany("DELETE FROM blocks WHERE series_id = :id AND first_position = :first", stale)
    connection.load("blocks", _BLOCK, blocks)
    connection.executemany(f"UPDATE series SET {_SET_SUMMARY}, open_block = :open WHERE id = :id", changes)


def read_series(connection: Executes, series_id: int) -> Columns:
    """Return every point of a series, within a transaction."""
    return _joined(connection.execute(_ALL, {"id": series_id}), series_id)


def _joined(rows: Iterable[tuple[bytes]], series_id: int) -> Columns:
    made = Columns()
    for (data,) in rows:
        made.extend(_decoded(data, series_id))
    return made


_ALL = "SELECT data FROM blocks WHERE series_id = :id ORDER BY first_position"
_BLOCK = ("series_id", "first_position", "points", "peaks", "data")


def _row(block: Columns) -> tuple[int, int, bytes, bytes]:
    return block.positions[0], len(block), block.peaks(), block.encode()


def _block(connection: Executes, series_id: int, first: int) -> Columns:
    sql = "SELECT data FROM blocks WHERE series_id = :id AND first_position = :first"
    row = connection.execute(sql, {"id": series_id, "first": first}).fetchone()
    if row is None:
        raise DatabaseError(f"the last block of metric series {series_id} is missing; the database was changed by hand")
    return _decoded(row[0], series_id)


def _decoded(data: bytes, series_id: int) -> Columns:
    try:
        return decode(bytes(data))
    except ValueError as error:
        raise DatabaseError(f"metric series {series_id} is damaged: {error}") from error


def _is_new(connection: Executes, writer: str, batch: int) -> bool:
    """Note that ``writer`` has written ``batch``; returns whether it had not."""
    bind = {"id": writer, "batch": batch, "now": time.time()}
    row = connection.execute("SELECT batch FROM writers WHERE id = :id", bind).fetchone()
    if row is not None and row[0] >= batch:
        return False
    connection.execute(
        "INSERT INTO writers (id, batch, written_at) VALUES (:id, :batch, :now) "
        "ON CONFLICT (id) DO UPDATE SET batch = :batch, written_at = :now",
        bind,
    )
    return True


def grouped(logged: Sequence[Logged]) -> dict[str, Columns]:
    """Return name -> columns, with positions from 0 in the order logged."""
    if not logged:
        return {}
    names, values, *rest = zip(*logged)  # as many columns as the shortest row has
    if not rest:
        return _with_bulks(logged)
    steps, times = rest
    if names.count(names[0]) == len(names):
        return {names[0]: Columns.of(list(range(len(names))), values, steps, times)}
    made = {}
    for name, indices in _places(names).items():
        made[name] = Columns.of(
            indices, [values[i] for i in indices], [steps[i] for i in indices], [times[i] for i in indices]
        )
    return made


def _places(names: Iterable[str]) -> dict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        found[name].append(index)
    return found


def _with_bulks(logged: Sequence[Logged]) -> dict[str, Columns]:
    starts = [0, *accumulate(len(item[1]) if isinstance(item[1], Columns) else 1 for item in logged)]
    made: defaultdict[str, Columns] = defaultdict(Columns)
    for item, start, end in zip(logged, starts, starts[1:]):
        if isinstance(item[1], Columns):
            more = replace(item[1], positions=array("q", list(range(start, end))))
        else:
            _, value, step, at = item
            more = Columns.of([start], [value], [step], [at])
        made[item[0]].extend(more)
    return made


def _thinned(columns: Columns, places: Sequence[int], stretches: int) -> Columns:
    """Return the first and last point, and the peaks of ``stretches``; ``places`` counts up to each point."""
    chosen = {0, len(columns) - 1}
    start = 1
    for number in range(1, stretches + 1):
        end = min(bisect_left(places, number * places[-1] // stretches, start), len(columns) - 1)
        if end > start:
            chosen.update(start + index for index in columns[start:end].extremes())
        start = max(start, end)
    return columns.pick(sorted(chosen))


def _or_none(value: float) -> float | None:
    """Return what stands for ``value`` in a summary; None for NaN."""
    return None if value != value else storable(value)
