"""A run that goes back to a checkpoint: the metrics after it become an earlier attempt. The SQL and nothing else."""

from __future__ import annotations

import time
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


class AttemptTable:
    """The table of earlier attempts.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def cut(self, experiment_id: str, checkpoint_id: str, position: int) -> Attempt | None:
        """Move what was logged at ``position`` and later into an attempt of its own, in one durable transaction.

        Args:
            experiment_id: whose metrics.
            checkpoint_id: where the run goes back to.
            position: how many points it had there.

        Returns:
            The attempt, or None where nothing was logged later.
        """
        with self._db.transaction(durable=True) as connection:
            bind: dict[str, Any] = {"id": experiment_id, "position": position, "checkpoint": checkpoint_id}
            # Whoever writes to this experiment waits here.
            connection.execute("UPDATE experiments SET points = points WHERE id = :id", bind)
            (points,) = connection.execute("SELECT points FROM experiments WHERE id = :id", bind).fetchone()
            if points <= position:
                return None
            sql = "SELECT COALESCE(MAX(number), 0) + 1 FROM attempts WHERE experiment_id = :id"
            (number,) = connection.execute(sql, bind).fetchone()
            made = Attempt(int(number), checkpoint_id, points - position, time.time())
            for name, series_id in self._db.metrics.names(experiment_id).items():
                _cut_series(connection, {**bind, "number": number, "name": name, "series": series_id})
            connection.execute("UPDATE experiments SET points = :position WHERE id = :id", bind)
            connection.execute(
                "INSERT INTO attempts (experiment_id, number, checkpoint_id, points, cut_at) "
                "VALUES (:id, :number, :checkpoint_id, :points, :cut_at)",
                {**bind, **made._asdict()},
            )
        return made

    def of(self, experiment_id: str) -> list[Attempt]:
        """Return the earlier attempts of an experiment, the first one first."""
        rows = self._db.query(
            "SELECT number, checkpoint_id, points, cut_at FROM attempts WHERE experiment_id = :id ORDER BY number",
            {"id": experiment_id},
        )
        return [Attempt(*row) for row in rows]


def _cut_series(connection: Executes, bind: dict[str, Any]) -> None:
    columns = read_series(connection, bind["series"])
    kept, cut = columns.split(bind["position"])
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
