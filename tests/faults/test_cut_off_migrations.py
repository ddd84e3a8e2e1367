"""Migrations that end in the middle, on all three databases: the next opening does the rest, and nothing is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection, schema
from model_checkpoint.database.schema import Executes, Migration
from tests.servers import KINDS, new_database

POINTS = [("loss", 0.5, None, 0), ("acc", 0.1, None, 1), ("loss", None, "nan", None), ("loss", None, "-0.0", 2**62)]
METADATA = {"m": 1, "captured": {"captured_at": 2.5, "git": None}}


class PowerLoss(Exception):
    """A statement that was never reached."""


class Counting:
    """A connection that counts the statements, and stops at one of them."""

    def __init__(self, connection: Executes, last: int, counted: list[int]) -> None:
        self._connection = connection
        self._last = last
        self._counted = counted

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self._counted[0] == self._last:
                raise PowerLoss
            self._counted[0] += 1
            return getattr(self._connection, name)(*arguments)

        return call


def counting(migrations: list[Migration], last: int = -1) -> tuple[list[Migration], list[int]]:
    counted = [0]

    def wrapped(migration: Migration) -> Migration:
        def apply(connection: Executes, types: Mapping[str, str]) -> None:
            migration(Counting(connection, last, counted), types)

        apply.__name__ = migration.__name__
        return apply

    return list(map(wrapped, migrations)), counted


def fill(database: EnhancedDatabaseConnection) -> None:
    """Store an experiment as version 1 did."""
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO experiments (id, name, status, created_at, config, metadata, points) "
            "VALUES ('a', 'old', 'running', 1.0, '{}', :metadata, 4)",
            {"metadata": json.dumps(METADATA)},
        )
        ids = {}
        for name in ("loss", "acc"):
            bind = {"name": name}
            connection.execute("INSERT INTO metric_series (experiment_id, name) VALUES ('a', :name)", bind)
            row = connection.execute("SELECT id FROM metric_series WHERE name = :name", bind).fetchone()
            ids[name] = row[0]
        connection.executemany(
            "INSERT INTO metric_points (series_id, position, step, value, special, timestamp) "
            "VALUES (:id, :position, :step, :value, :special, 3.5)",
            [
                {"id": ids[name], "position": i, "step": step, "value": value, "special": special}
                for i, (name, value, special, step) in enumerate(POINTS)
            ],
        )


def shape(database: EnhancedDatabaseConnection) -> object:
    """Return every table with its columns and indexes, as the database itself tells."""
    if database.database_url.startswith("sqlite"):
        return sorted(database.query("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
    mine = "DATABASE()" if database.database_url.startswith("mysql") else "current_schema()"
    columns = database.query(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
        f"WHERE table_schema = {mine}"
    )
    if database.database_url.startswith("mysql"):
        sql = "SELECT table_name, index_name, column_name FROM information_schema.statistics WHERE table_schema = "
        return sorted(columns), sorted(database.query(sql + mine))
    sql = "SELECT tablename, indexname FROM pg_indexes WHERE schemaname = "
    return sorted(columns), sorted(database.query(sql + mine))


def check(url: str, expected: object) -> None:
    run = ExperimentTracker.resume("a", url)
    points = [(p["metric_name"], repr(p["metric_value"]), p["step"], p["timestamp"]) for p in run.get_metrics()]
    assert points == [(name, repr(float(special or value)), step, 3.5) for name, value, special, step in POINTS]
    assert (run.record.metadata, run.captured) == ({"m": 1}, METADATA["captured"])
    assert shape(run.database) == expected
    assert [number for (number,) in run.database.query("SELECT number FROM migrations ORDER BY number")] == list(
        range(1, schema.latest_version() + 1)
    )
    run.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_migration_that_ends_at_any_statement_is_done_again_and_nothing_is_lost(
    kind: str,
    tmp_path: Path,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = list(schema._MIGRATIONS)

    def cut_off(url: str, last: int) -> int:
        monkeypatch.setattr(schema, "_MIGRATIONS", real[:1])
        with closing(EnhancedDatabaseConnection(url)) as database:
            fill(database)
        wrapped, counted = counting(real, last)
        monkeypatch.setattr(schema, "_MIGRATIONS", wrapped)
        try:
            EnhancedDatabaseConnection(url).close()
            assert last < 0
        except PowerLoss:
            pass
        monkeypatch.setattr(schema, "_MIGRATIONS", real)
        return counted[0]

    (tmp_path / "whole").mkdir()
    with new_database(kind, tmp_path / "whole") as url:
        statements = cut_off(url, -1)
        with closing(EnhancedDatabaseConnection(url)) as database:
            expected = shape(database)
        check(url, expected)
    points = sorted(chance.sample(range(statements), min(statements, effort(4, 10**9))))
    tried(len(points))
    for last in points:
        folder = tmp_path / str(last)
        folder.mkdir()
        with new_database(kind, folder) as url:
            assert cut_off(url, last) == last
            check(url, expected)
