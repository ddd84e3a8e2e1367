"""What verifications found: the SQL and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from model_checkpoint.database.checkpoints import LIVE, bump_of

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection


class VerificationTable:
    """The table of verifications.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def record(self, checkpoint_id: str, result: Mapping[str, Any], verified_at: float) -> None:
        """Store one outcome of verification: when, the result, and each file's digests; the status follows it."""
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO verifications (checkpoint_id, verified_at, verified, error, files) "
                "SELECT id, :at, :verified, :error, :files FROM checkpoints WHERE id = :id",
                {
                    "id": checkpoint_id,
                    "at": verified_at,
                    "verified": int(result["verified"]),
                    "error": result["error"],
                    "files": json.dumps(result["files"]),
                },
            )
            changed = connection.execute(
                f"UPDATE checkpoints SET status = :status WHERE id = :id AND status IN {LIVE} AND status <> :status",
                {"id": checkpoint_id, "status": "committed" if result["verified"] else "corrupt"},
            )
            if changed.rowcount:
                bump_of(connection, checkpoint_id)
