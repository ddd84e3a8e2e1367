"""The tables, as numbered migrations. Each runs in one transaction with its record; the number is the version.

NaN and the infinities survive on every database: a metric value that is not finite is NULL with ``special`` saying
which (MySQL has neither, SQLite turns NaN into NULL), and scores are JSON text or ``repr`` text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from model_checkpoint.errors import FormatVersionError


class Executes(Protocol):
    """What a migration needs of a connection in a transaction."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...


_MIGRATIONS: list[Callable[[Executes], None]] = []


def migration(function: Callable[[Executes], None]) -> Callable[[Executes], None]:
    """Register the next migration; its place in this file is its number, from 1."""
    _MIGRATIONS.append(function)
    return function


def latest_version() -> int:
    """Return the schema version that this package writes."""
    return len(_MIGRATIONS)


def migrate(connection: Executes, name: str) -> None:
    """Bring a database up to date, inside the transaction that the caller holds.

    Args:
        connection: in a write transaction, so that two processes cannot both migrate.
        name: the database, for errors.

    Raises:
        FormatVersionError: it was written by a newer version of this package; nothing was changed.
    """
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations "
        "(number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at REAL NOT NULL)"
    )
    (version,) = connection.execute("SELECT COALESCE(MAX(number), 0) FROM migrations").fetchone()
    if version > latest_version():
        raise FormatVersionError(f"database {name}", version, latest_version())
    for number, function in enumerate(_MIGRATIONS[version:], version + 1):
        function(connection)
        connection.execute(
            "INSERT INTO migrations VALUES (:number, :name, :now)",
            {"number": number, "name": function.__name__, "now": time.time()},
        )


@migration
def create_tables(connection: Executes) -> None:
    """The first schema."""
    for statement in _FIRST_SCHEMA.split(";"):
        connection.execute(statement)


_FIRST_SCHEMA = """
CREATE TABLE experiments (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, project TEXT, parent_id TEXT REFERENCES experiments(id),
    status TEXT NOT NULL, created_at REAL NOT NULL, ended_at REAL,
    config TEXT NOT NULL, metadata TEXT NOT NULL, points INTEGER NOT NULL DEFAULT 0);
CREATE INDEX experiments_by_project ON experiments (project, created_at);
CREATE TABLE tags (
    experiment_id TEXT NOT NULL REFERENCES experiments(id), tag TEXT NOT NULL, position INTEGER NOT NULL,
    PRIMARY KEY (experiment_id, tag)) WITHOUT ROWID;
CREATE TABLE parameters (
    experiment_id TEXT NOT NULL REFERENCES experiments(id), name TEXT NOT NULL, number REAL, text TEXT,
    PRIMARY KEY (experiment_id, name)) WITHOUT ROWID;
CREATE INDEX parameters_by_number ON parameters (name, number);
CREATE TABLE metric_series (
    id INTEGER PRIMARY KEY, experiment_id TEXT NOT NULL REFERENCES experiments(id), name TEXT NOT NULL,
    UNIQUE (experiment_id, name));
CREATE TABLE metric_points (
    series_id INTEGER NOT NULL REFERENCES metric_series(id), position INTEGER NOT NULL, step INTEGER,
    value REAL, special TEXT, timestamp REAL NOT NULL,
    PRIMARY KEY (series_id, position)) WITHOUT ROWID;
CREATE TABLE stores (
    id TEXT PRIMARY KEY, path TEXT NOT NULL, revision INTEGER NOT NULL DEFAULT 0);
CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY, experiment_id TEXT NOT NULL REFERENCES experiments(id),
    store_id TEXT NOT NULL REFERENCES stores(id), sequence INTEGER NOT NULL, status TEXT NOT NULL,
    checkpoint_type TEXT NOT NULL, epoch INTEGER NOT NULL, step INTEGER NOT NULL, details TEXT NOT NULL,
    backend TEXT NOT NULL, size INTEGER NOT NULL, created_at REAL NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
    update_best INTEGER NOT NULL, manifest_sha256 TEXT, metric_position INTEGER, owner TEXT NOT NULL);
CREATE INDEX checkpoints_by_sequence ON checkpoints (store_id, experiment_id, status, sequence);
CREATE INDEX checkpoints_in_order ON checkpoints (sequence);
CREATE TABLE files (
    checkpoint_id TEXT NOT NULL REFERENCES checkpoints(id), name TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT,
    PRIMARY KEY (checkpoint_id, name)) WITHOUT ROWID;
CREATE TABLE best (
    experiment_id TEXT NOT NULL REFERENCES experiments(id), criterion TEXT NOT NULL,
    checkpoint_id TEXT NOT NULL REFERENCES checkpoints(id), value TEXT NOT NULL, position INTEGER NOT NULL,
    PRIMARY KEY (experiment_id, criterion)) WITHOUT ROWID;
CREATE INDEX best_by_checkpoint ON best (checkpoint_id);
CREATE TABLE verifications (
    id INTEGER PRIMARY KEY, checkpoint_id TEXT NOT NULL REFERENCES checkpoints(id), verified_at REAL NOT NULL,
    verified INTEGER NOT NULL, error TEXT, files TEXT NOT NULL);
CREATE INDEX verifications_by_checkpoint ON verifications (checkpoint_id, id);
CREATE TABLE tombstones (
    checkpoint_id TEXT PRIMARY KEY, experiment_id TEXT NOT NULL, store_id TEXT NOT NULL, reason TEXT NOT NULL,
    generation INTEGER NOT NULL, deleted_at REAL NOT NULL, purged_at REAL);
CREATE INDEX tombstones_in_trash ON tombstones (store_id, experiment_id, purged_at, generation)
"""
