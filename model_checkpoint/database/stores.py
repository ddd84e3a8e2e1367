"""Checkpoint directories, as the database knows them: the SQL and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model_checkpoint.database.checkpoints import LIVE

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection


class StoreTable:
    """The table of checkpoint directories.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def open(self, store_id: str, path: str) -> None:
        """Note where the checkpoint directory ``store_id`` lies now."""
        if self._db.query("SELECT 1 FROM stores WHERE id = :id AND path = :path", {"id": store_id, "path": path}):
            return
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO stores (id, path) VALUES (:id, :path) ON CONFLICT (id) DO UPDATE SET path = :path",
                {"id": store_id, "path": path},
            )

    def path(self, store_id: str) -> str | None:
        """Return where the checkpoint directory ``store_id`` lay when it was last opened, or None."""
        rows = self._db.query("SELECT path FROM stores WHERE id = :id", {"id": store_id})
        return rows[0][0] if rows else None

    def elsewhere(self, store_id: str, experiment_id: str, path: str) -> list[str]:
        """Return the directories other than ``path`` that hold checkpoints of the experiment."""
        rows = self._db.query(
            "SELECT DISTINCT s.path FROM checkpoints c JOIN stores s ON s.id = c.store_id "
            "WHERE c.experiment_id = :experiment AND c.store_id <> :store AND s.path <> :path "
            f"AND c.status IN {LIVE}",
            {"experiment": experiment_id, "store": store_id, "path": path},
        )
        return [path for (path,) in rows]
