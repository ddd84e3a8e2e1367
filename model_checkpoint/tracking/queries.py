"""Questions about many experiments and checkpoints, in words."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.checkpoints import LIVE
from model_checkpoint.database.models import CheckpointRecord, ExperimentRecord
from model_checkpoint.errors import ConfigurationError, ExperimentNotFoundError
from model_checkpoint.query import compile_columns, compile_filter, compile_order
from model_checkpoint.query.groups import Group, differences, group_of
from model_checkpoint.tracking.hierarchy import ExperimentNode, Project, Totals, build_tree
from model_checkpoint.utils.jsonable import exact, flatten

# What a search looks for, and of which rows.
_WANTED = {"experiments": ("e.id", "1 = 1"), "checkpoints": ("c.id", f"c.status IN {LIVE}")}


class Queries:
    """Asks a database; reads and never writes.

    A filter is a subset of Python: comparisons, also in chains, ``and``, ``or``, ``not``, ``in``, ``is None``, and
    ``.matches(regular expression)``, ``.contains``, ``.startswith`` and ``.endswith`` of texts:

        metrics.val_loss.min < 0.3 and config.optimizer.lr >= 1e-3 and 'baseline' in tags and age < days(7)

    An experiment has ``id``, ``name``, ``project``, ``status``, ``parent`` and ``forked_from`` (ids),
    ``created_at`` and ``ended_at`` (Unix seconds), ``age`` and ``duration`` (seconds), ``tags``, ``config.<name>``, and
    ``metrics.<name>`` with ``.last`` (what the name alone means), ``.min``, ``.max``, ``.mean`` or ``.points``. Names
    that are no words are written ``metrics["val/loss"].min``. A checkpoint has ``id``, ``experiment_id``,
    ``checkpoint_type``, ``epoch``, ``step``, ``loss``, ``val_loss``, ``metrics.<name>``, ``size``, ``pinned``,
    ``created_at`` and ``age``; what it has not is asked of its experiment, and ``experiment.`` before a name always
    means that.

    A condition on what is not there is false, so that ``not`` of it is true. Regular expressions match anywhere, and
    are those of the database: Python's on SQLite, POSIX on PostgreSQL, PCRE on MariaDB. Python's can take very long
    where the pattern is made for it, such as ``(a+)+$``: take none from people whom you do not trust.

    Args:
        database: a URL, or a connection, which stays its owner's. A SQLite file that cannot be written is read all the
            same, if this version of the package has written it.

    Raises:
        ConfigurationError: there is no such database, or it holds no experiments.
        DatabaseError, FormatVersionError, MissingDependencyError: it cannot be used.
    """

    def __init__(self, database: EnhancedDatabaseConnection | str = "sqlite:///experiments.db") -> None:
        self._owned = isinstance(database, str)
        self.database = EnhancedDatabaseConnection(database, create=False) if isinstance(database, str) else database

    def search_experiments(
        self, filter: str | None = None, order_by: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[ExperimentRecord]:
        """Return the experiments that a filter lets through.

        Args:
            filter: see ``Queries``; None for all.
            order_by: fields as in a filter, with commas between them and ``desc`` behind them or not:
                ``"metrics.accuracy.max desc, created_at"``. What has no value comes last. Without it, newest first.
            limit, offset: how many at most, and how many are passed over.

        Raises:
            QueryError: the filter or order cannot be understood; it points at the place.
            ConfigurationError: limit or offset is no count.
            DatabaseError: the database refused, a regular expression that it does not know, for one.
        """
        return self.database.experiments.several(self._page("experiments", filter, order_by, limit, offset))

    def search_checkpoints(
        self, filter: str | None = None, order_by: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[CheckpointRecord]:
        """Return the checkpoints of all experiments and directories that a filter lets through.

        The best one of all runs of a project: ``search_checkpoints("project == 'vision'", "val_loss", limit=1)``.
        Arguments and errors are those of ``search_experiments``; without an order, the newest come first.
        """
        return self.database.checkpoints.several(self._page("checkpoints", filter, order_by, limit, offset))

    def group_by(self, field: str, over: str, filter: str | None = None) -> list[Group]:
        """Return what runs that share a value have in common: across seeds, for one.

        Args:
            field: what they share, such as ``config.model``.
            over: the number that is asked for, such as ``metrics.accuracy.max``.
            filter: see ``Queries``; None for all experiments.

        Returns:
            One ``Group`` for each value, with ``n``, ``mean``, ``std`` and the 95 % ``interval``; largest mean first.

        Raises:
            QueryError: a field or the filter cannot be understood.
        """
        now = time.time()
        made = compile_filter(filter, "experiments", self.database.text_tests, now)
        shared = compile_columns(field, made, now)
        wanted = compile_columns(over, made, now)[0]
        rows = self.database.query(f"SELECT {wanted}, {', '.join(shared)} FROM {made.source}", made.binds)
        groups: dict[Any, list[float]] = {}
        for number, *value in rows:
            groups.setdefault(_config_value(*value) if len(value) == 2 else exact(value[0]), []).extend(
                [exact(number)] * isinstance(number, (int, float))
            )
        found = [group_of(value, numbers) for value, numbers in groups.items()]
        # NaN is the mean of infinities of both signs.
        return sorted(found, key=lambda g: (g.mean is None or g.mean != g.mean, -(g.mean or 0.0)))

    def tree(self, project: str | None = None, root: str | None = None) -> list[ExperimentNode]:
        """Return experiments with their children below them, oldest first, each with the totals of all below it.

        Args:
            project: only of this project, also below experiments of another one; None for all.
            root: only this experiment and what is below it.

        Raises:
            ExperimentNotFoundError: there is no such ``root``.
        """
        nodes = self._nodes()
        if root is not None:
            if root not in nodes:
                raise ExperimentNotFoundError(f"experiment {root!r} is not in {self.database!r}")
            return [nodes[root]]
        if project is None:
            return [node for node in nodes.values() if node.parent_id not in nodes]
        inside = {node.id for node in nodes.values() if node.project == project}
        return [nodes[id] for id in nodes if id in inside and nodes[id].parent_id not in inside]

    def _nodes(self) -> dict[str, ExperimentNode]:
        return build_tree(
            self.database.query(
                "SELECT e.id, e.name, e.project, e.parent_id, e.status, e.created_at, e.points, "
                "COALESCE(c.number, 0), COALESCE(c.bytes, 0) FROM experiments e LEFT JOIN "
                "(SELECT experiment_id, COUNT(*) AS number, SUM(size) AS bytes FROM checkpoints "
                f"WHERE status IN {LIVE} GROUP BY experiment_id) c ON c.experiment_id = e.id "
                "ORDER BY e.created_at, e.id"
            )
        )

    def projects(self) -> dict[str | None, Project]:
        """Return name -> project, of all that have an experiment."""
        totals: dict[str | None, Totals] = {}
        for node in self._nodes().values():
            totals[node.project] = totals.get(node.project, Totals()) + node.own
        described = self.database.experiments.projects()
        found = {}
        for name, total in totals.items():
            tags, metadata = ([], {}) if name is None else described.get(name, ([], {}))
            found[name] = Project(name, tuple(tags), metadata, total)
        return found

    def compare(self, experiment_ids: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
        """Return in what experiments differ.

        Returns:
            ``config`` and ``metrics``: name -> experiment id -> value, of what is not the same in all. Config names are
            dotted; metrics are ``<name>.last``, ``.min``, ``.max`` and ``.mean``.

        Raises:
            ExperimentNotFoundError: one of them is not there.
            ConfigurationError: this is one text.
        """
        if isinstance(experiment_ids, str):
            raise ConfigurationError(f"compare() takes several ids, not the one text {experiment_ids!r}")
        configs: dict[str, dict[str, Any]] = {}
        metrics: dict[str, dict[str, Any]] = {}
        for experiment_id in experiment_ids:
            record = self.database.experiments.get(experiment_id)
            if record is None:
                raise ExperimentNotFoundError(f"experiment {experiment_id!r} is not in {self.database!r}")
            leaves = flatten(record.config)
            configs[experiment_id] = {name: _config_value(number, text) for name, number, text in leaves}
            summaries = self.database.metrics.summaries(experiment_id)
            metrics[experiment_id] = {
                f"{name}.{part}": summary.told()[part]
                for name, summary in summaries.items()
                for part in ("last", "min", "max", "mean")
            }
        return {"config": differences(configs), "metrics": differences(metrics)}

    def _page(self, kind: str, filter: str | None, order_by: str | None, limit: int, offset: int) -> list[str]:
        """Return the ids of a page of what a filter lets through."""
        if not isinstance(order_by, str | None):
            raise ConfigurationError(f"order_by must be one text such as 'name, created_at desc', not {order_by!r}")
        for name, count, most in (("limit", limit, 30_000), ("offset", offset, 2**62)):
            if type(count) is not int or not 0 <= count <= most:
                raise ConfigurationError(f"{name} must be a count of at most {most:,}, not {count!r}")
        now = time.time()
        for probing in (True, False) if filter else (False,):
            made = compile_filter(filter, kind, self.database.text_tests, now, probing)
            compile_order(order_by, made, now)
            column, only = _WANTED[kind]
            made.where = f"{only} AND {made.where}"
            for source in made.sources(limit + offset):
                sql = f"SELECT {column} FROM {source} LIMIT :limit OFFSET :offset"
                rows = self.database.query(sql, {**made.binds, "limit": limit, "offset": offset})
                if len(rows) == limit:  # what comes later stands behind the page
                    return [row[0] for row in rows]
        return [row[0] for row in rows]

    def close(self) -> None:
        """Let go of the database, if it was opened here."""
        if self._owned:
            self.database.close()

    def __enter__(self) -> Queries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _config_value(number: float | None, text: str | None) -> Any:
    """Return what a leaf of a config was: of a number, the text is its ``repr``."""
    if number is None or text is None:
        return text
    if text in ("True", "False"):
        return text == "True"
    return float(text) if set(text) & set(".en") else int(text)  # 0.5, 1e+16, inf
