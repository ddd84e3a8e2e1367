"""A run that goes back to a checkpoint: the metrics after it become an earlier attempt. The SQL and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from model_checkpoint.database.metrics import Summary, add_points, read_series

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection
    from model_checkpoint.database.schema import Executes


class Attempt(NamedTuple):
    """Metrics that were logged after a checkpoint to which the run went back.

    Attributes:
        number: 1 for the first; the run itself is 0.
        checkpoint_id: where it went back to.
        points: how many points were cut.
        cut_at: Unix seconds.
    """

    number: int
    checkpoint_id: str
    points: int
    cut_at: float


class _Piece(NamedTuple):
    """The points of an attempt from position ``first`` to before ``end``."""

    attempt: int
    first: int
    end: int


class AttemptTable:
    """The table of earlier attempts.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def go_back(self, experiment_id: str, checkpoint_id: str, position: int, attempts: int) -> None:
        """Let an experiment's metrics be what they were at a checkpoint, in one durable transaction.

        What was logged since moves into an attempt of its own. What was cut since, because the run went back to an
        earlier checkpoint, comes back; the attempt keeps it, too.

        Args:
            experiment_id: whose metrics.
            checkpoint_id: where the run goes back to.
            position: how many points it had there.
            attempts: how many earlier attempts it had there.
        """
        with self._db.transaction(durable=True) as connection:
            bind: dict[str, Any] = {"id": experiment_id, "attempts": attempts}
            # Whoever writes to this experiment waits here.
            connection.execute("UPDATE experiments SET points = points WHERE id = :id", bind)
            (points,) = connection.execute("SELECT points FROM experiments WHERE id = :id", bind).fetchone()
            end, pieces = _way_back(position, connection.execute(_STARTS, bind).fetchall())
            if points > end:
                self._cut(connection, experiment_id, checkpoint_id, end, points)
            for piece in pieces:
                self._bring_back(connection, experiment_id, piece)
            bind["points"] = position
            connection.execute("UPDATE experiments SET points = :points WHERE id = :id", bind)

    def _cut(self, connection: Executes, experiment_id: str, checkpoint_id: str, end: int, points: int) -> None:
        bind: dict[str, Any] = {"id": experiment_id, "checkpoint": checkpoint_id, "end": end}
        bind |= {"points": points - end, "now": time.time()}
        sql = "SELECT COALESCE(MAX(number), 0) + 1 FROM attempts WHERE experiment_id = :id"
        (bind["number"],) = connection.execute(sql, bind).fetchone()
        for name, series_id in self._db.metrics.names(experiment_id).items():
            _cut_series(connection, {**bind, "name": name, "series": series_id})
        connection.execute(
            "INSERT INTO attempts (experiment_id, number, checkpoint_id, points, cut_at) "
            "VALUES (:id, :number, :checkpoint, :points, :now)",
            bind,
        )

    def _bring_back(self, connection: Executes, experiment_id: str, piece: _Piece) -> None:
        found = {}
        for name, series_id in self._db.metrics.names(experiment_id, piece.attempt).items():
            columns = read_series(connection, series_id).split(piece.end)[0].split(piece.first)[1]
            if len(columns):
                found[name] = columns
        add_points(connection, self._db.metrics.series(connection, experiment_id, list(found)), found)

    def of(self, experiment_id: str) -> list[Attempt]:
        """Return the earlier attempts of an experiment, the first one first."""
        rows = self._db.query(
            "SELECT number, checkpoint_id, points, cut_at FROM attempts WHERE experiment_id = :id ORDER BY number",
            {"id": experiment_id},
        )
        return [Attempt(*row) for row in rows]


# attempt -> position of its first point: of those that a checkpoint does not know.
_STARTS = (
    "SELECT s.attempt, MIN(b.first_position) FROM series s JOIN blocks b ON b.series_id = s.id "
    "WHERE s.experiment_id = :id AND s.attempt > :attempts GROUP BY s.attempt ORDER BY s.attempt"
)


def _way_back(position: int, cuts: Iterable[tuple[int, int]]) -> tuple[int, list[_Piece]]:
    """Return how many points of the run are still those before a checkpoint, and where the others are, in order.

    Args:
        position: how many points there were at the checkpoint.
        cuts: (attempt, position of its first point) of each that was cut since, in the order in which they were.
    """
    pieces: list[_Piece] = []
    for attempt, first in cuts:
        if first < position:
            pieces.insert(0, _Piece(attempt, first, position))
            position = first
    return position, pieces


def _cut_series(connection: Executes, bind: dict[str, Any]) -> None:
    columns = read_series(connection, bind["series"])
    kept, cut = columns.split(bind["end"])
    if not len(cut):
        return
    # The row becomes the attempt's, and what is kept gets a new one: whoever reads meanwhile has the one or the other.
    connection.execute("UPDATE series SET attempt = :number WHERE id = :series", bind)
    connection.execute("DELETE FROM blocks WHERE series_id = :series", bind)
    add_points(connection, {"": (bind["series"], None, *Summary())}, {"": cut})
    if len(kept):
        connection.execute("INSERT INTO series (experiment_id, name) VALUES (:id, :name)", bind)
        sql = "SELECT id FROM series WHERE experiment_id = :id AND name = :name AND attempt = 0"
        (new,) = connection.execute(sql, bind).fetchone()
        add_points(connection, {"": (new, None, *Summary())}, {"": kept})
