"""Experiments, their tags and parameters: the SQL and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ExperimentNotFoundError
from model_checkpoint.utils.jsonable import dumps, flatten, loads

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection

_COLUMNS = "id, name, project, parent_id, status, created_at, ended_at, config, metadata, forked_from"


class ExperimentTable:
    """The tables of experiments.

    Args:
        db: the database that they are in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def create(self, experiment: ExperimentRecord, captured: Mapping[str, Any] | None = None) -> None:
        """Store a new experiment and what was captured of it, durably; one that exists already stays as it is."""
        with self._db.transaction(durable=True) as connection:
            known = "SELECT id FROM experiments WHERE id = :id"
            if connection.execute(known, {"id": experiment.id}).fetchone():
                return
            parent = connection.execute(known, {"id": experiment.parent_id}).fetchone()
            connection.execute(
                f"INSERT INTO experiments ({_COLUMNS}) VALUES "
                "(:id, :name, :project, :parent, :status, :created, :ended, :config, :metadata, :forked)",
                {
                    "id": experiment.id,
                    "name": experiment.name,
                    "project": experiment.project,
                    "parent": parent[0] if parent else None,
                    "status": experiment.status,
                    "created": experiment.created_at,
                    "ended": experiment.ended_at,
                    "forked": experiment.forked_from,
                    "config": dumps(experiment.config),
                    "metadata": dumps(experiment.metadata),
                },
            )
            if captured is not None:
                self.set_captured(experiment.id, captured)
            self.add_tags(experiment.id, experiment.tags)
            self._set_parameters(experiment.id, experiment.config)

    def position(self, experiment_id: str) -> int:
        """Return how many metric points are stored of an experiment."""
        rows = self._db.query("SELECT points FROM experiments WHERE id = :id", {"id": experiment_id})
        return int(rows[0][0]) if rows else 0

    def set_parent(self, experiment_id: str, parent_id: str | None) -> None:
        """Put an experiment that has no parent under one that exists; does nothing otherwise."""
        with self._db.transaction(durable=True) as connection:
            bind = {"id": experiment_id, "parent": parent_id}
            if connection.execute("SELECT 1 FROM experiments WHERE id = :parent", bind).fetchone():
                sql = "UPDATE experiments SET parent_id = :parent WHERE id = :id AND parent_id IS NULL"
                connection.execute(sql, bind)

    def get(self, experiment_id: str) -> ExperimentRecord | None:
        """Return the experiment, or None."""
        found = self._records(":id", {"id": experiment_id})
        return found[0] if found else None

    def several(self, experiment_ids: Sequence[str]) -> list[ExperimentRecord]:
        """Return experiments, in the order of their ids; those that are gone are left out."""
        names = {f"i{place}": experiment_id for place, experiment_id in enumerate(experiment_ids)}
        found = self._records(", ".join(f":{name}" for name in names), names) if names else []
        places = {experiment_id: place for place, experiment_id in enumerate(experiment_ids)}
        return sorted(found, key=lambda record: places[record.id])

    def _records(self, ids: str, binds: Mapping[str, Any]) -> list[ExperimentRecord]:
        rows = self._db.query(f"SELECT {_COLUMNS} FROM experiments WHERE id IN ({ids})", binds)
        tags: dict[str, list[Any]] = {}
        for experiment_id, tag in self._db.query(
            f"SELECT experiment_id, tag FROM tags WHERE experiment_id IN ({ids}) ORDER BY position", binds
        ):
            tags.setdefault(experiment_id, []).append(loads(tag))
        records = []
        for row in rows:
            found = dict(zip(_COLUMNS.split(", "), row))
            found.update(config=loads(found["config"]), metadata=loads(found["metadata"]))
            records.append(ExperimentRecord(**found, tags=tuple(tags.get(found["id"], ()))))
        return records

    def add_tags(self, experiment_id: str, tags: Iterable[Any]) -> None:
        """Add tags behind those that there are; a tag that is there stays where it is."""
        with self._db.transaction() as connection:
            known = [
                tag
                for (tag,) in self._db.query("SELECT tag FROM tags WHERE experiment_id = :id", {"id": experiment_id})
            ]
            new = [tag for tag in dict.fromkeys(map(dumps, tags)) if tag not in known]
            connection.executemany(
                "INSERT INTO tags (experiment_id, tag, position) VALUES (:id, :tag, :position)",
                [{"id": experiment_id, "tag": tag, "position": len(known) + i} for i, tag in enumerate(new)],
            )

    def update_config(self, experiment_id: str, values: Mapping[str, Any]) -> None:
        """Merge ``values`` into the config; top-level names that exist are replaced."""
        with self._db.transaction(durable=True) as connection:
            config = {**self._of("config", experiment_id), **values}
            connection.execute(
                "UPDATE experiments SET config = :config WHERE id = :id", {"id": experiment_id, "config": dumps(config)}
            )
            self._set_parameters(experiment_id, config)

    def update_metadata(self, experiment_id: str, values: Mapping[str, Any]) -> None:
        """Merge ``values`` into the metadata; top-level names that exist are replaced."""
        with self._db.transaction(durable=True) as connection:
            metadata = {**self._of("metadata", experiment_id), **values}
            connection.execute(
                "UPDATE experiments SET metadata = :metadata WHERE id = :id",
                {"id": experiment_id, "metadata": dumps(metadata)},
            )

    def claim(self, experiment_id: str, name: str, value: Any) -> bool:
        """Set one name of the metadata, durably, unless it has that value; returns whether this call has set it."""
        with self._db.transaction(durable=True) as connection:
            # Two that claim it at once wait for each other here.
            connection.execute("UPDATE experiments SET name = name WHERE id = :id", {"id": experiment_id})
            if self._of("metadata", experiment_id).get(name) == value:
                return False
            self.update_metadata(experiment_id, {name: value})
            return True

    def _of(self, column: str, experiment_id: str) -> dict[str, Any]:
        rows = self._db.query(f"SELECT {column} FROM experiments WHERE id = :id", {"id": experiment_id})
        if not rows:
            raise ExperimentNotFoundError(f"experiment {experiment_id!r} is no longer in {self._db!r}")
        return loads(rows[0][0])  # type: ignore[no-any-return]

    def captured(self, experiment_id: str) -> dict[str, Any] | None:
        """Return what was captured of the code and the machine, or None."""
        rows = self._db.query("SELECT captured FROM captures WHERE experiment_id = :id", {"id": experiment_id})
        return loads(rows[0][0]) if rows else None

    def set_captured(self, experiment_id: str, captured: Mapping[str, Any]) -> None:
        """Store what was captured, in the place of what there is."""
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO captures (experiment_id, captured) VALUES (:id, :captured) "
                "ON CONFLICT (experiment_id) DO UPDATE SET captured = :captured",
                {"id": experiment_id, "captured": dumps(captured)},
            )

    def projects(self) -> dict[str, tuple[list[Any], dict[str, Any]]]:
        """Return name -> tags and metadata of the projects that were described."""
        rows = self._db.query("SELECT name, tags, metadata FROM projects")
        return {name: (loads(tags), loads(metadata)) for name, tags, metadata in rows}

    def describe_project(self, name: str, tags: Iterable[Any], metadata: Mapping[str, Any]) -> None:
        """Add tags to a project, and merge ``metadata`` into its own, durably."""
        with self._db.transaction(durable=True) as connection:
            # Two that describe it at once wait for each other here.
            connection.execute(
                "INSERT INTO projects (name, tags, metadata) VALUES (:name, '[]', '{}') "
                "ON CONFLICT (name) DO UPDATE SET name = :name",
                {"name": name},
            )
            known, old = self.projects()[name]
            merged = {dumps(tag): tag for tag in (*known, *tags)}  # 1 and True are two tags
            connection.execute(
                "UPDATE projects SET tags = :tags, metadata = :metadata WHERE name = :name",
                {"name": name, "tags": dumps([*merged.values()]), "metadata": dumps({**old, **metadata})},
            )

    def _set_parameters(self, experiment_id: str, config: Mapping[str, Any]) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM parameters WHERE experiment_id = :id", {"id": experiment_id})
            connection.executemany(
                "INSERT INTO parameters (experiment_id, name, number, text) VALUES (:id, :name, :number, :text)",
                # A name that two leaves flatten to ({"a.b": 1, "a": {"b": 2}}) keeps the last.
                list(
                    {
                        name: {"id": experiment_id, "name": name, "number": number, "text": text}
                        for name, number, text in flatten(config)
                        if len(name) <= self._db.max_name  # a longer one is in the config, and cannot be searched for
                    }.values()
                ),
            )

    def conclude(self, experiment_ids: Iterable[str], status: str, over: str = "running") -> None:
        """Store the final status of those runs that nobody has given one, or only the one of ``over``, durably."""
        bind = {"status": status, "over": over, "now": time.time()}
        with self._db.transaction(durable=True) as connection:
            connection.executemany(
                "UPDATE experiments SET status = :status, ended_at = :now "
                "WHERE id = :id AND status IN ('running', :over)",
                [{"id": experiment_id, **bind} for experiment_id in experiment_ids],
            )

    def set_status(self, experiment_id: str, status: str) -> None:
        """Store a status, durably; any but ``running`` also notes the time of the end."""
        with self._db.transaction(durable=True) as connection:
            connection.execute(
                "UPDATE experiments SET status = :status, ended_at = :ended WHERE id = :id",
                {"id": experiment_id, "status": status, "ended": None if status == "running" else time.time()},
            )
