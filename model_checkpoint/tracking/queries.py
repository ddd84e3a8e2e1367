"""Questions about many experiments and checkpoints, in words."""

from __future__ import annotations

import time

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.checkpoints import LIVE
from model_checkpoint.database.models import CheckpointRecord, ExperimentRecord
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.query import Compiled, compile_filter, compile_order


class Queries:
    """Asks a database; reads and never writes.

    A filter is a subset of Python: comparisons, also in chains, ``and``, ``or``, ``not``, ``in``, ``is None``, and
    ``.matches(regular expression)``, ``.contains``, ``.startswith`` and ``.endswith`` of texts:

        metrics.val_loss.min < 0.3 and config.optimizer.lr >= 1e-3 and 'baseline' in tags and age < days(7)

    An experiment has ``id``, ``name``, ``project``, ``status``, ``parent``, ``created_at`` and ``ended_at`` (Unix
    seconds), ``age`` and ``duration`` (seconds), ``tags``, ``config.<name>``, and ``metrics.<name>`` with ``.last``
    (what the name alone means), ``.min``, ``.max``, ``.mean`` or ``.points``. Names that are no words are written
    ``metrics["val/loss"].min``. A checkpoint has ``id``, ``experiment_id``, ``checkpoint_type``, ``epoch``, ``step``,
    ``loss``, ``val_loss``, ``metrics.<name>``, ``size``, ``pinned``, ``created_at`` and ``age``; what it has not is
    asked of its experiment, and ``experiment.`` before a name always means that.

    A condition on what is not there is false, so that ``not`` of it is true. Regular expressions match anywhere, and
    are those of the database: Python's on SQLite, POSIX on PostgreSQL, PCRE on MariaDB.

    Args:
        database: a URL, or a connection, which stays its owner's.
    """

    def __init__(self, database: EnhancedDatabaseConnection | str = "sqlite:///experiments.db") -> None:
        self._owned = isinstance(database, str)
        self.database = (
            database if isinstance(database, EnhancedDatabaseConnection) else EnhancedDatabaseConnection(database)
        )

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
        source = self._source(filter, order_by, "experiments", limit, offset)
        return self.database.experiments.search(_sql(source), source.binds, limit, offset)

    def search_checkpoints(
        self, filter: str | None = None, order_by: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[CheckpointRecord]:
        """Return the checkpoints of all experiments and directories that a filter lets through.

        The best one of all runs of a project: ``search_checkpoints("project == 'vision'", "val_loss", limit=1)``.
        Arguments and errors are those of ``search_experiments``; without an order, the newest come first.
        """
        source = self._source(filter, order_by, "checkpoints", limit, offset)
        source.where = f"c.status IN {LIVE} AND {source.where}"
        return self.database.checkpoints.search(_sql(source), source.binds, limit, offset)

    def _source(self, filter: str | None, order_by: str | None, kind: str, limit: int, offset: int) -> Compiled:
        for name, count in (("limit", limit), ("offset", offset)):
            if type(count) is not int or not 0 <= count <= 30_000:
                raise ConfigurationError(f"{name} must be a count of at most 30,000, not {count!r}")
        now = time.time()
        made = compile_filter(filter, kind, self.database.text_tests, now)
        compile_order(order_by, kind, made, now)
        return made

    def close(self) -> None:
        """Let go of the database, if it was opened here."""
        if self._owned:
            self.database.close()

    def __enter__(self) -> Queries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sql(source: Compiled) -> str:
    return f"{source.joins} WHERE {source.where} ORDER BY {source.order}"
