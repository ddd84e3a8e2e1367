"""Checkpoints, their best flags, files and verifications: the SQL and nothing else.

Every write bumps the revision of its checkpoint directory (its store), which is how readers know that a cached record
is still true.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model_checkpoint.database.models import RECORD, CheckpointRecord, record_of_row
from model_checkpoint.errors import DatabaseError
from model_checkpoint.utils.jsonable import LARGEST, escape
from model_checkpoint.utils.names import MAX_SEQUENCE

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection
    from model_checkpoint.database.schema import Executes

Scores = Mapping[str, float]  # criterion -> value
Decide = Callable[[CheckpointRecord, Scores, Collection[str]], Scores]

_BUMP = "UPDATE stores SET revision = revision + 1 WHERE id = COALESCE(:id, id)"
_SCORE = "INSERT INTO scores (checkpoint_id, name, value) VALUES (:id, :name, :value)"
_FILE = ("id", "name", "size", "sha256")
_INSERT_FILE = "INSERT INTO files (checkpoint_id, name, size, sha256) VALUES (:id, :name, :size, :sha256)"
LIVE = "('committed', 'corrupt')"
_REPAIR = "rebuild_index() writes rows anew from the manifests, and so does opening the directory with a new database"


class CheckpointTable:
    """The tables of checkpoints.

    Args:
        db: the database that they are in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def revision(self, store_id: str) -> int:
        """Return a number that changes with every change to the store's checkpoints, by whatever process."""
        for (revision,) in self._db.query("SELECT revision FROM stores WHERE id = :id", {"id": store_id}):
            return int(revision)
        raise DatabaseError(f"{self._db!r} has lost the row of checkpoint directory {store_id}; {_REPAIR}")

    def begin(
        self, record: CheckpointRecord, details: Mapping[str, Any], store_id: str, position: int | None, behind: int
    ) -> int:
        """Store the intent to save ``record`` (``details``: its ``details_of``); returns its sequence.

        Args:
            position: how many metric points the experiment had when its state was taken; None: as many as it has now
                and those ``behind``, which are logged and not stored yet.
        """
        with self._db.transaction() as connection:
            return _insert(connection, record, details, store_id, None, position, behind)

    def commit(
        self,
        record: CheckpointRecord,
        store_id: str,
        files: Iterable[tuple[str, int, str | None]],
        decide: Decide,
        sequence: int | None = None,
    ) -> tuple[Scores, int]:
        """Make a published checkpoint exist: the row, its files and the best flags, in one durable transaction.

        Args:
            record: with its final size and manifest digest. Without a row yet (recovery), one is made.
            sequence: the manifest's, for a row that is made: what was found late is not what was saved last.
            store_id: the directory that it is in.
            files: (name, bytes, SHA-256 or None) of each.
            decide: called with the record, the holders' values by criterion, and the criteria whose holder began later;
                returns the criteria that it now holds, with its values.

        Returns:
            The criteria that it took, with its values; and how many checkpoints the experiment now has in the store.
        """
        bind = {"id": record.id, "store": store_id, "size": record.size, "digest": record.manifest_sha256}
        bind |= {"experiment": record.experiment_id}
        with self._db.transaction(durable=True) as connection:
            if not connection.execute("SELECT 1 FROM checkpoints WHERE id = :id", bind).fetchone():
                _insert(connection, record, details_of(record), store_id, sequence)
            connection.execute(
                "UPDATE checkpoints SET status = 'committed', size = :size, manifest_sha256 = :digest WHERE id = :id",
                bind,
            )
            for table in ("files", "scores"):  # of an earlier try
                connection.execute(f"DELETE FROM {table} WHERE checkpoint_id = :id", bind)
            connection.executemany(_SCORE, scores_of(record))
            for file in files:
                connection.execute(_INSERT_FILE, dict(zip(_FILE, (record.id, *file))))
            holders, younger = {}, set()
            for criterion, value, began_later in connection.execute(
                "SELECT b.criterion, b.value, h.sequence > r.sequence FROM best b "
                "JOIN checkpoints h ON h.id = b.checkpoint_id JOIN checkpoints r ON r.id = :id "
                "WHERE b.experiment_id = :experiment",
                bind,
            ):
                holders[criterion] = float(value)
                if began_later:
                    younger.add(criterion)
            taken = decide(record, holders, younger)
            for criterion, score in taken.items():
                _hold(connection, record.experiment_id, criterion, record.id, score)
            # Of all, when the flags may have left another directory's checkpoint.
            connection.execute(_BUMP, {"id": None if taken else store_id})
            (count,) = connection.execute(
                "SELECT COUNT(*) FROM checkpoints "
                f"WHERE store_id = :store AND experiment_id = :experiment AND status IN {LIVE}",
                bind,
            ).fetchone()
        return taken, count

    def correct(self, record: CheckpointRecord, files: list[tuple[str, int, str | None]], sequence: int) -> bool:
        """Let the row of a checkpoint say what ``record`` says, its files too; returns whether it did not already."""
        names = ["id", "experiment_id", "checkpoint_type", "epoch", "step", "backend", "size", "created_at"]
        bind = {name: getattr(record, name) for name in [*names, "manifest_sha256"]}
        bind |= {"details": json.dumps(details_of(record)), "sequence": sequence}
        bind["update_best"] = int(record.update_best)
        columns = [name for name in bind if name != "id"]
        with self._db.transaction(durable=True) as connection:
            rows = connection.execute("SELECT name, size, sha256 FROM files WHERE checkpoint_id = :id", bind).fetchall()
            sql = f"SELECT {', '.join(columns)} FROM checkpoints WHERE id = :id"
            found = connection.execute(sql, bind).fetchone()
            if sorted(rows) == sorted(files) and tuple(found or ()) == tuple(bind[name] for name in columns):
                return False
            change = ", ".join(f"{name} = :{name}" for name in columns)
            connection.execute(f"UPDATE checkpoints SET {change} WHERE id = :id", bind)
            for table in ("files", "scores"):
                connection.execute(f"DELETE FROM {table} WHERE checkpoint_id = :id", bind)
            connection.executemany(_SCORE, scores_of(record))
            connection.executemany(_INSERT_FILE, [dict(zip(_FILE, (record.id, *file))) for file in files])
            bump_of(connection, record.id)
        return True

    def fail(self, checkpoint_id: str) -> None:
        """Note that a save did not come to its end."""
        self._change(checkpoint_id, "status = 'failed'", "status = 'saving'")

    def set_pinned(self, checkpoint_id: str, pinned: bool) -> bool:
        """Protect a checkpoint from removal, or no longer; returns whether it is (still) there."""
        return self._change(checkpoint_id, f"pinned = {int(pinned)}", f"status IN {LIVE}")

    def _change(self, checkpoint_id: str, change: str, only_if: str) -> bool:
        with self._db.transaction(durable=True) as connection:
            sql = f"UPDATE checkpoints SET {change} WHERE id = :id AND {only_if}"
            changed = bool(connection.execute(sql, {"id": checkpoint_id}).rowcount)
            bump_of(connection, checkpoint_id)
        return changed

    def get(self, store_id: str, checkpoint_id: str) -> CheckpointRecord | None:
        """Return a committed or corrupt checkpoint of the store, or None."""
        where = f"c.store_id = :store AND c.id = :id AND c.status IN {LIVE}"
        for record in self._records(where, store=store_id, id=checkpoint_id):
            if record.id != checkpoint_id:  # an index and its row differ
                raise DatabaseError(f"{self._db!r} has another row in the place of {checkpoint_id}; {_REPAIR}")
            return record
        return None

    def records(self, store_id: str, experiment_id: str | None = None) -> list[CheckpointRecord]:
        """Return the committed and corrupt checkpoints, of one experiment or all, in the order of their saves."""
        only = "" if experiment_id is None else "AND c.experiment_id = :experiment"
        return self._records(
            f"c.store_id = :store {only} AND c.status IN {LIVE} ORDER BY c.sequence",
            store=store_id,
            experiment=experiment_id,
        )

    def of_experiment(self, experiment_id: str) -> list[CheckpointRecord]:
        """Return the experiment's committed and corrupt checkpoints in every store, oldest first."""
        where = f"c.experiment_id = :experiment AND c.status IN {LIVE} ORDER BY c.sequence"
        return self._records(where, experiment=experiment_id)

    def several(self, checkpoint_ids: Sequence[str]) -> list[CheckpointRecord]:
        """Return checkpoints of every store, in the order of their ids; those that are gone are left out."""
        names = {f"i{place}": checkpoint_id for place, checkpoint_id in enumerate(checkpoint_ids)}
        ids = ", ".join(f":{name}" for name in names)
        found = {record.id: record for record in (self._records(f"c.id IN ({ids})", **names) if names else [])}
        return [found[checkpoint_id] for checkpoint_id in checkpoint_ids if checkpoint_id in found]

    def latest(self, store_id: str, experiment_id: str, checkpoint_type: str | None = None) -> str | None:
        """Return the id of the newest save of the experiment, of one type or any, or None."""
        only = "" if checkpoint_type is None else "AND checkpoint_type = :type"
        rows = self._db.query(
            f"SELECT id FROM checkpoints WHERE store_id = :store AND experiment_id = :experiment {only} "
            f"AND status IN {LIVE} ORDER BY sequence DESC LIMIT 1",
            {"store": store_id, "experiment": experiment_id, "type": checkpoint_type},
        )
        return rows[0][0] if rows else None

    def holders(self, experiment_id: str) -> dict[str, str]:
        """Return criterion -> id of its best checkpoint, in the order in which the criteria first appeared."""
        sql = "SELECT criterion, checkpoint_id FROM best WHERE experiment_id = :id ORDER BY position, criterion"
        return dict(self._db.query(sql, {"id": experiment_id}))

    def holder(self, store_id: str, experiment_id: str, criterion: str) -> str | None:
        """Return the id of the experiment's best checkpoint by ``criterion`` if it is in this store, or None."""
        rows = self._db.query(
            "SELECT c.id FROM best b JOIN checkpoints c ON c.id = b.checkpoint_id WHERE b.experiment_id = :experiment "
            f"AND b.criterion = :criterion AND c.store_id = :store AND c.status IN {LIVE}",
            {"experiment": experiment_id, "criterion": criterion, "store": store_id},
        )
        return rows[0][0] if rows else None

    def home(self, checkpoint_id: str) -> tuple[str, str, str] | None:
        """Return store id, folder and status under which the database has a checkpoint, of whatever store, or None."""
        rows = self._db.query(
            "SELECT c.store_id, COALESCE(s.path, ''), c.experiment_id, c.status FROM checkpoints c "
            "LEFT JOIN stores s ON s.id = c.store_id WHERE c.id = :id",
            {"id": checkpoint_id},
        )
        return (rows[0][0], os.path.join(*rows[0][1:3], checkpoint_id), rows[0][3]) if rows else None

    def adopt(self, checkpoint_id: str, store_id: str) -> bool:
        """Let a checkpoint belong to another store; returns whether it is one that was committed."""
        with self._db.transaction(durable=True) as connection:
            bind = {"id": checkpoint_id, "store": store_id}
            connection.execute("UPDATE checkpoints SET store_id = :store WHERE id = :id", bind)
            bump(connection, None)
            sql = f"SELECT 1 FROM checkpoints WHERE id = :id AND status IN {LIVE}"
            return connection.execute(sql, bind).fetchone() is not None

    def statuses(self, store_id: str) -> dict[str, tuple[str, str, int]]:
        """Return id -> (status, experiment id, bytes) of every row of the store, whatever its status."""
        rows = self._db.query(
            "SELECT id, status, experiment_id, size FROM checkpoints WHERE store_id = :store", {"store": store_id}
        )
        return {row[0]: row[1:] for row in rows}

    def file_sizes(self, store_id: str) -> dict[str, dict[str, int]]:
        """Return id -> file name -> bytes, of every committed checkpoint of the store."""
        rows = self._db.query(
            "SELECT f.checkpoint_id, f.name, f.size FROM files f JOIN checkpoints c ON c.id = f.checkpoint_id "
            "WHERE c.store_id = :store AND c.status = 'committed'",
            {"store": store_id},
        )
        found: dict[str, dict[str, int]] = {}
        for checkpoint_id, name, size in rows:
            found.setdefault(checkpoint_id, {})[name] = size
        return found

    def replace_holders(self, experiment_id: str, best: Mapping[str, tuple[str, float]]) -> None:
        """Let ``best`` (criterion -> checkpoint id, value) be all of the experiment's best flags."""
        bind = {"id": experiment_id}
        with self._db.transaction() as connection:
            rows = connection.execute("SELECT criterion FROM best WHERE experiment_id = :id", bind).fetchall()
            connection.executemany(
                "DELETE FROM best WHERE experiment_id = :id AND criterion = :criterion",
                [{**bind, "criterion": criterion} for (criterion,) in rows if criterion not in best],
            )
            for criterion, (checkpoint_id, value) in best.items():
                _hold(connection, experiment_id, criterion, checkpoint_id, value)
            bump(connection, None)

    def locate(self, checkpoint_id: str) -> tuple[str, str | None] | None:
        """Return the folder and the manifest digest of a committed checkpoint of any store, or None."""
        rows = self._db.query(
            "SELECT s.path, c.experiment_id, c.manifest_sha256 FROM checkpoints c JOIN stores s ON s.id = c.store_id "
            f"WHERE c.id = :id AND c.status IN {LIVE}",
            {"id": checkpoint_id},
        )
        return (os.path.join(rows[0][0], rows[0][1], checkpoint_id), rows[0][2]) if rows else None

    def position(self, experiment_id: str, checkpoint_id: str) -> tuple[int, int] | None:
        """Return the metric points and earlier attempts that an experiment had at its checkpoint; None: it has none."""
        rows = self._db.query(
            "SELECT metric_position, attempts FROM checkpoints WHERE id = :id AND experiment_id = :experiment "
            f"AND status IN {LIVE}",
            {"id": checkpoint_id, "experiment": experiment_id},
        )
        return tuple(rows[0]) if rows else None

    def ids(self, experiment_id: str | None) -> list[str]:
        """Return the ids of an experiment's checkpoints in every store (of all experiments for None), oldest first."""
        only = "" if experiment_id is None else "AND experiment_id = :experiment"
        rows = self._db.query(
            f"SELECT id FROM checkpoints WHERE status IN {LIVE} {only} ORDER BY store_id, sequence",
            {"experiment": experiment_id},
        )
        return [checkpoint_id for (checkpoint_id,) in rows]

    def _records(self, where: str, **bind: Any) -> list[CheckpointRecord]:
        # In one statement, which sees one state: a flag that moved between two would be nowhere, or at two checkpoints.
        rows = self._db.query(
            f"SELECT b.criterion, {RECORD} FROM checkpoints c LEFT JOIN best b ON b.checkpoint_id = c.id "
            "LEFT JOIN verifications v ON v.id = (SELECT MAX(id) FROM verifications WHERE checkpoint_id = c.id) "
            f"WHERE {where}",
            bind,
        )
        best: dict[tuple[Any, ...], list[str]] = {}
        for criterion, *row in rows:
            best.setdefault(tuple(row), []).extend([criterion] * (criterion is not None))
        try:
            return [record_of_row(row, held) for row, held in best.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatabaseError(f"a checkpoint's row in {self._db!r} is damaged ({error}); {_REPAIR}") from error


def details_of(record: CheckpointRecord) -> dict[str, Any]:
    """Return what a user gave to a save as strict JSON, for row and manifest; ``decode_details`` undoes it."""
    details: dict[str, Any] = {
        "checkpoint_type": record.checkpoint_type,
        "epoch": record.epoch,
        "step": record.step,
        "update_best": record.update_best,
        "loss": record.loss,
        "val_loss": record.val_loss,
        "metrics": dict(record.metrics),
        "config": None if record.config is None else escape(record.config),
        "notes": record.notes,
        "model_name": record.model_name,
    }
    for scores in (details, details["metrics"]):
        for name, value in scores.items():
            if type(value) is float and value - value != 0:  # strict JSON has neither NaN nor the infinities
                scores[name] = repr(value)
    return details


def scores_of(record: CheckpointRecord) -> list[dict[str, Any]]:
    """Return what a checkpoint can be found and ordered by, as rows: NaN has no place in an order."""
    scores = {"loss": record.loss, "val_loss": record.val_loss}
    for name, value in record.metrics.items():
        scores[f"metrics.{name}"] = value
    rows = []
    for name, score in scores.items():
        if score is not None and score == score:
            rows.append({"id": record.id, "name": name, "value": max(-LARGEST, min(LARGEST, score))})
    return rows


def _insert(
    connection: Executes,
    record: CheckpointRecord,
    details: Mapping[str, Any],
    store_id: str,
    sequence: int | None = None,
    position: int | None = None,
    behind: int = 0,
) -> int:
    if sequence is None:
        (sequence,) = connection.execute("SELECT COALESCE(MAX(sequence), 0) + 1 FROM checkpoints").fetchone()
        if sequence >= MAX_SEQUENCE:
            raise DatabaseError(f"a checkpoint has the sequence {sequence - 1}, which no save had; {_REPAIR}")
    connection.execute(
        "INSERT INTO checkpoints (id, experiment_id, store_id, sequence, status, checkpoint_type, epoch, step, "
        "details, backend, size, created_at, update_best, owner, metric_position, attempts) VALUES (:id, :experiment, "
        ":store, :sequence, 'saving', :type, :epoch, :step, :details, :backend, 0, :created_at, :update_best, :owner, "
        "COALESCE(:position, (SELECT points FROM experiments WHERE id = :experiment) + :behind), "
        "(SELECT COUNT(*) FROM attempts WHERE experiment_id = :experiment))",
        {
            "position": position,
            "behind": behind,
            "id": record.id,
            "experiment": record.experiment_id,
            "store": store_id,
            "sequence": sequence,
            "type": record.checkpoint_type,
            "epoch": record.epoch,
            "step": record.step,
            "details": json.dumps(details),
            "backend": record.backend,
            "created_at": record.created_at,
            "update_best": int(record.update_best),
            "owner": f"{socket.gethostname()} {os.getpid()}",
        },
    )
    return int(sequence)


def _hold(connection: Executes, experiment_id: str, criterion: str, checkpoint_id: str, value: float) -> None:
    bind = {"experiment": experiment_id, "criterion": criterion, "id": checkpoint_id, "value": repr(value)}
    sql = "SELECT COUNT(*) FROM best WHERE experiment_id = :experiment"
    (bind["position"],) = connection.execute(sql, bind).fetchone()
    connection.execute(
        "INSERT INTO best (experiment_id, criterion, checkpoint_id, value, position) "
        "VALUES (:experiment, :criterion, :id, :value, :position) "
        "ON CONFLICT (experiment_id, criterion) DO UPDATE SET checkpoint_id = :id, value = :value",
        bind,
    )


def bump(connection: Executes, store_id: str | None) -> None:
    """Change the revision of one store, or of all: what readers have cached is no longer true."""
    connection.execute(_BUMP, {"id": store_id})


def bump_of(connection: Executes, checkpoint_id: str) -> None:
    """Change the revision of the store that a checkpoint is in."""
    connection.execute(
        "UPDATE stores SET revision = revision + 1 WHERE id = (SELECT store_id FROM checkpoints WHERE id = :id)",
        {"id": checkpoint_id},
    )
