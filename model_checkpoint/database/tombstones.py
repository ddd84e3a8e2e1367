"""Deleted checkpoints: their tombstones, and what of them is still in the trash. The SQL and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model_checkpoint.database.checkpoints import bump

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection


class TombstoneTable:
    """The table of tombstones.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def add(self, store_id: str, doomed: Mapping[str, str], generation: int, holders: Mapping[str, Any]) -> None:
        """Write the tombstones of ``doomed`` (id -> reason); best flags move to ``holders`` where theirs are doomed.

        Args:
            store_id: the directory.
            doomed: id -> why it goes.
            generation: the removal pass, see ``generation``.
            holders: experiment id -> criterion -> (checkpoint id, value): what remains best, for the experiments of
                ``doomed``.
        """
        with self._db.transaction(durable=True) as connection:
            for checkpoint_id, reason in doomed.items():
                bind = {"id": checkpoint_id, "reason": reason, "generation": generation, "now": time.time()}
                connection.execute(
                    "INSERT INTO tombstones (checkpoint_id, experiment_id, store_id, reason, generation, deleted_at) "
                    "SELECT id, experiment_id, store_id, :reason, :generation, :now FROM checkpoints WHERE id = :id "
                    "ON CONFLICT (checkpoint_id) DO NOTHING",
                    bind,
                )
                connection.execute("UPDATE checkpoints SET status = 'trashed' WHERE id = :id", bind)
            for experiment_id, best in holders.items():
                self._db.checkpoints.replace_holders(experiment_id, best)
            bump(connection, store_id)

    def remove(self, store_id: str, checkpoint_id: str) -> None:
        """Take a tombstone back; the checkpoint is what its last verification found it to be."""
        with self._db.transaction(durable=True) as connection:
            bind = {"id": checkpoint_id}
            verified = connection.execute(
                "SELECT verified FROM verifications WHERE checkpoint_id = :id ORDER BY id DESC LIMIT 1", bind
            ).fetchone()
            bind["status"] = "corrupt" if verified and not verified[0] else "committed"
            connection.execute("UPDATE checkpoints SET status = :status WHERE id = :id", bind)
            connection.execute("DELETE FROM tombstones WHERE checkpoint_id = :id", bind)
            bump(connection, store_id)

    def generation(self, store_id: str, experiment_id: str) -> int:
        """Return the number of the experiment's last retention pass that removed something; 0 before the first."""
        rows = self._db.query(
            "SELECT COALESCE(MAX(generation), 0) FROM tombstones "
            "WHERE store_id = :store AND experiment_id = :experiment",
            {"store": store_id, "experiment": experiment_id},
        )
        return int(rows[0][0])

    def content(
        self, store_id: str, experiment_id: str | None = None, before_generation: int | None = None
    ) -> list[tuple[str, str, str, int]]:
        """Return (id, experiment id, reason, bytes) of what is in the trash, the longest there first.

        Args:
            store_id: the directory.
            experiment_id: only of this experiment.
            before_generation: only of passes before this one.
        """
        only = "" if experiment_id is None else "AND t.experiment_id = :experiment "
        only += "" if before_generation is None else "AND t.generation < :generation "
        return self._db.query(
            "SELECT t.checkpoint_id, t.experiment_id, t.reason, c.size FROM tombstones t JOIN checkpoints c "
            f"ON c.id = t.checkpoint_id WHERE t.store_id = :store AND t.purged_at IS NULL {only}ORDER BY t.deleted_at",
            {"store": store_id, "experiment": experiment_id, "generation": before_generation},
        )

    def buried(self, store_id: str) -> set[str]:
        """Return the ids of everything that was ever deleted on purpose and not restored."""
        rows = self._db.query("SELECT checkpoint_id FROM tombstones WHERE store_id = :store", {"store": store_id})
        return {checkpoint_id for (checkpoint_id,) in rows}

    def purged(self, store_id: str) -> set[str]:
        """Return the ids of what was removed for good, so that nothing brings it back."""
        sql = "SELECT checkpoint_id FROM tombstones WHERE store_id = :store AND purged_at IS NOT NULL"
        return {checkpoint_id for (checkpoint_id,) in self._db.query(sql, {"store": store_id})}

    def purge(self, checkpoint_ids: Sequence[str]) -> None:
        """Forget rows whose files are about to be unlinked; the tombstones stay, so that recovery knows."""
        with self._db.transaction(durable=True) as connection:
            for checkpoint_id in checkpoint_ids:
                bind = {"id": checkpoint_id, "now": time.time()}
                connection.execute("UPDATE tombstones SET purged_at = :now WHERE checkpoint_id = :id", bind)
                for table in ("files", "verifications", "best", "scores"):
                    connection.execute(f"DELETE FROM {table} WHERE checkpoint_id = :id", bind)
                connection.execute("DELETE FROM checkpoints WHERE id = :id AND status = 'trashed'", bind)
