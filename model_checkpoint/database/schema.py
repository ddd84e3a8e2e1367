"""The tables, as numbered migrations. Each runs in one transaction with its record; the number is the version.

NaN and the infinities survive on every database: a metric value that is not finite is NULL with ``special`` saying
which (MySQL has neither, SQLite turns NaN into NULL), and scores are JSON text or ``repr`` text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from model_checkpoint.database.checkpoints import scores_of
from model_checkpoint.database.columns import Columns
from model_checkpoint.database.metrics import Summary, add_points
from model_checkpoint.database.models import CheckpointRecord, decode_details
from model_checkpoint.errors import FormatVersionError
from model_checkpoint.utils.jsonable import dumps, loads


class Executes(Protocol):
    """A connection in a transaction. The binds of a statement are ``:name``, and its values a dict by name."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...

    def load(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], /) -> None:
        """Insert many rows in the fastest way that the database has."""


Migration = Callable[[Executes, Mapping[str, str]], None]
_MIGRATIONS: list[Migration] = []


def migration(function: Migration) -> Migration:
    """Register the next migration; its place in this file is its number, from 1."""
    _MIGRATIONS.append(function)
    return function


def latest_version() -> int:
    """Return the schema version that this package writes."""
    return len(_MIGRATIONS)


def migrate_once(connection: Executes, name: str, types: Mapping[str, str]) -> bool:
    """Apply the next migration, inside the transaction that the caller holds; returns whether there are more.

    Args:
        connection: in a transaction that has the database alone, so that two processes cannot both migrate.
        name: the database, for errors.
        types: what the tables are made of in this database: ``id`` (text that is a key), ``name`` (text of up to 500
            characters that is a key), ``text``, ``big`` (64-bit integer), ``real`` (64-bit float), ``blob`` (bytes),
            ``serial`` (a key that numbers itself), ``prefix`` (how much of a text an index takes), ``end`` and
            ``clustered`` (behind a table's columns).

    Raises:
        FormatVersionError: it was written by a newer version of this package; nothing was changed.
    """
    version = version_of(connection, types)
    check_version(version, name)
    if version == latest_version():  # another process was faster
        return False
    function = _MIGRATIONS[version]
    function(connection, types)
    connection.execute(
        "INSERT INTO migrations (number, name, applied_at) VALUES (:number, :name, :now)",
        {"number": version + 1, "name": function.__name__, "now": time.time()},
    )
    return bool(version + 1 < latest_version())


def version_of(connection: Executes, types: Mapping[str, str]) -> int:
    """Return the number of the last migration that was applied; 0 for a new database, which gets the table of them."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations ("
        "number INTEGER PRIMARY KEY, name {text} NOT NULL, applied_at {real} NOT NULL){end}".format_map(types)
    )
    return int(connection.execute("SELECT COALESCE(MAX(number), 0) FROM migrations").fetchone()[0])


def check_version(version: int, name: str) -> None:
    """Refuse a database that a newer version of this package has written.

    Raises:
        FormatVersionError: it was.
    """
    if version > latest_version():
        raise FormatVersionError(f"database {name}", version, latest_version())


@migration
def create_tables(connection: Executes, types: Mapping[str, str]) -> None:
    """The first schema."""
    for statement in _FIRST_SCHEMA.format_map(types).split(";"):
        connection.execute(statement)


@migration
def blocks_and_scores(connection: Executes, types: Mapping[str, str]) -> None:
    """Points move from a row each to blocks of them; series get summaries, checkpoints scores to be found by."""
    for statement in _BLOCKS.format_map(types).split(";"):
        connection.execute(statement)
    rows = connection.execute("SELECT id, experiment_id, name FROM metric_series ORDER BY id").fetchall()
    for number, experiment_id, name in rows:
        found = connection.execute(
            "SELECT position, value, special, step, timestamp FROM metric_points WHERE series_id = :id "
            "ORDER BY position",
            {"id": number},
        ).fetchall()
        bind = {"experiment": experiment_id, "name": name}
        connection.execute("INSERT INTO series (experiment_id, name) VALUES (:experiment, :name)", bind)
        ((new,),) = connection.execute(
            "SELECT id FROM series WHERE experiment_id = :experiment AND name = :name", bind
        ).fetchall()
        if found:
            positions, numbers, specials, steps, times = zip(*found)
            values = [float(special) if number is None else number for number, special in zip(numbers, specials)]
            columns = Columns.of(positions, values, steps, times)
            add_points(connection, {name: (new, None, *Summary())}, {name: columns})
    for checkpoint_id, details in connection.execute("SELECT id, details FROM checkpoints").fetchall():
        scores = decode_details(json.loads(details))
        record = CheckpointRecord(checkpoint_id, "", **{name: scores[name] for name in ("loss", "val_loss", "metrics")})
        connection.executemany(
            "INSERT INTO scores (checkpoint_id, name, value) VALUES (:id, :name, :value)", scores_of(record)
        )
    # The tables go in a step of their own: a server that commits every change of a table by itself must find
    # either the rows or the record of this step.
    connection.execute("DELETE FROM metric_points")
    connection.execute("DELETE FROM metric_series")


@migration
def drop_rows_of_points(connection: Executes, types: Mapping[str, str]) -> None:
    """The tables that the step before has emptied."""
    connection.execute("DROP TABLE IF EXISTS metric_points")
    connection.execute("DROP TABLE IF EXISTS metric_series")


@migration
def captures_projects_and_attempts(connection: Executes, types: Mapping[str, str]) -> None:
    """What is captured leaves the metadata; projects are described; checkpoints know which attempts came before."""
    for statement in _CAPTURES.format_map(types).split(";"):
        connection.execute(statement)
    rows = connection.execute("SELECT id, metadata FROM experiments WHERE metadata LIKE '%captured_at%'").fetchall()
    for experiment_id, text in rows:
        metadata = loads(text)
        captured = metadata.get("captured")
        if isinstance(captured, dict) and "captured_at" in captured:  # not what a user called so
            del metadata["captured"]
            bind = {"id": experiment_id, "captured": dumps(captured), "metadata": dumps(metadata)}
            connection.execute("INSERT INTO captures (experiment_id, captured) VALUES (:id, :captured)", bind)
            connection.execute("UPDATE experiments SET metadata = :metadata WHERE id = :id", bind)
    connection.execute(
        "UPDATE checkpoints SET attempts = (SELECT COUNT(*) FROM attempts "
        "WHERE attempts.experiment_id = checkpoints.experiment_id AND attempts.cut_at <= checkpoints.created_at)"
    )


@migration
def claims_of_grids(connection: Executes, types: Mapping[str, str]) -> None:
    """Configurations of grids, and who is at them."""
    connection.execute(_CLAIMS.format_map(types))


_CLAIMS = """
CREATE TABLE claims (
    grid {name} NOT NULL, number {big} NOT NULL, config {text} NOT NULL, state {id} NOT NULL, worker {id},
    expires_at {real}, experiment_id {id}, attempts {big} NOT NULL, PRIMARY KEY (grid, number)){clustered}
"""

_CAPTURES = """
CREATE TABLE captures (
    experiment_id {id} PRIMARY KEY REFERENCES experiments(id), captured {text} NOT NULL){end};
CREATE TABLE projects (
    name {name} PRIMARY KEY, tags {text} NOT NULL, metadata {text} NOT NULL){end};
ALTER TABLE checkpoints ADD COLUMN attempts {big} NOT NULL DEFAULT 0
"""

_BLOCKS = """
ALTER TABLE experiments ADD COLUMN forked_from {id};
CREATE INDEX experiments_by_parent ON experiments (parent_id);
CREATE TABLE series (
    id {serial}, experiment_id {id} NOT NULL REFERENCES experiments(id), attempt {big} NOT NULL DEFAULT 0,
    name {name} NOT NULL, open_block {big}, points {big} NOT NULL DEFAULT 0, numbers {big} NOT NULL DEFAULT 0,
    total {real} NOT NULL DEFAULT 0, last {real}, last_step {big}, low {real}, low_step {big}, high {real},
    high_step {big}, UNIQUE (experiment_id, attempt, name)){end};
CREATE TABLE blocks (
    series_id {big} NOT NULL REFERENCES series(id), first_position {big} NOT NULL, points {big} NOT NULL,
    peaks {blob} NOT NULL, data {blob} NOT NULL, PRIMARY KEY (series_id, first_position)){end};
CREATE TABLE writers (
    id {id} PRIMARY KEY, batch {big} NOT NULL, written_at {real} NOT NULL){end};
CREATE INDEX series_by_last ON series (name, attempt, last, experiment_id);
CREATE INDEX series_by_low ON series (name, attempt, low, experiment_id);
CREATE INDEX series_by_high ON series (name, attempt, high, experiment_id);
CREATE TABLE attempts (
    experiment_id {id} NOT NULL REFERENCES experiments(id), number {big} NOT NULL, checkpoint_id {id} NOT NULL,
    points {big} NOT NULL, cut_at {real} NOT NULL, PRIMARY KEY (experiment_id, number)){clustered};
CREATE TABLE scores (
    checkpoint_id {id} NOT NULL REFERENCES checkpoints(id), name {name} NOT NULL, value {real} NOT NULL,
    PRIMARY KEY (checkpoint_id, name)){clustered};
CREATE INDEX scores_by_value ON scores (name, value)
"""

_FIRST_SCHEMA = """
CREATE TABLE experiments (
    id {id} PRIMARY KEY, name {text} NOT NULL, project {text}, parent_id {id} REFERENCES experiments(id),
    status {text} NOT NULL, created_at {real} NOT NULL, ended_at {real},
    config {text} NOT NULL, metadata {text} NOT NULL, points {big} NOT NULL DEFAULT 0){end};
CREATE INDEX experiments_by_project ON experiments (project{prefix}, created_at);
CREATE TABLE tags (
    experiment_id {id} NOT NULL REFERENCES experiments(id), tag {name} NOT NULL, position {big} NOT NULL,
    PRIMARY KEY (experiment_id, tag)){clustered};
CREATE TABLE parameters (
    experiment_id {id} NOT NULL REFERENCES experiments(id), name {name} NOT NULL, number {real}, text {text},
    PRIMARY KEY (experiment_id, name)){clustered};
CREATE INDEX parameters_by_number ON parameters (name, number);
CREATE TABLE metric_series (
    id {serial}, experiment_id {id} NOT NULL REFERENCES experiments(id), name {name} NOT NULL,
    UNIQUE (experiment_id, name)){end};
CREATE TABLE metric_points (
    series_id {big} NOT NULL REFERENCES metric_series(id), position {big} NOT NULL, step {big},
    value {real}, special {text}, timestamp {real} NOT NULL,
    PRIMARY KEY (series_id, position)){clustered};
CREATE TABLE stores (
    id {id} PRIMARY KEY, path {text} NOT NULL, revision {big} NOT NULL DEFAULT 0){end};
CREATE TABLE checkpoints (
    id {id} PRIMARY KEY, experiment_id {id} NOT NULL REFERENCES experiments(id),
    store_id {id} NOT NULL REFERENCES stores(id), sequence {big} NOT NULL, status {id} NOT NULL,
    checkpoint_type {text} NOT NULL, epoch {big} NOT NULL, step {big} NOT NULL, details {text} NOT NULL,
    backend {text} NOT NULL, size {big} NOT NULL, created_at {real} NOT NULL, pinned {big} NOT NULL DEFAULT 0,
    update_best {big} NOT NULL, manifest_sha256 {text}, metric_position {big}, owner {text} NOT NULL){end};
CREATE INDEX checkpoints_by_sequence ON checkpoints (store_id, experiment_id, status, sequence);
CREATE INDEX checkpoints_in_order ON checkpoints (sequence);
CREATE TABLE files (
    checkpoint_id {id} NOT NULL REFERENCES checkpoints(id), name {name} NOT NULL, size {big} NOT NULL, sha256 {text},
    PRIMARY KEY (checkpoint_id, name)){clustered};
CREATE TABLE best (
    experiment_id {id} NOT NULL REFERENCES experiments(id), criterion {name} NOT NULL,
    checkpoint_id {id} NOT NULL REFERENCES checkpoints(id), value {text} NOT NULL, position {big} NOT NULL,
    PRIMARY KEY (experiment_id, criterion)){clustered};
CREATE INDEX best_by_checkpoint ON best (checkpoint_id);
CREATE TABLE verifications (
    id {serial}, checkpoint_id {id} NOT NULL REFERENCES checkpoints(id), verified_at {real} NOT NULL,
    verified {big} NOT NULL, error {text}, files {text} NOT NULL){end};
CREATE INDEX verifications_by_checkpoint ON verifications (checkpoint_id, id);
CREATE TABLE tombstones (
    checkpoint_id {id} PRIMARY KEY, experiment_id {id} NOT NULL, store_id {id} NOT NULL, reason {text} NOT NULL,
    generation {big} NOT NULL, deleted_at {real} NOT NULL, purged_at {real}){end};
CREATE INDEX tombstones_in_trash ON tombstones (store_id, experiment_id, purged_at, generation)
"""
