"""One door to the database: a pool of connections, transactions that nest, and the tables."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import LifoQueue
from typing import Any

from model_checkpoint.database.checkpoints import CheckpointTable
from model_checkpoint.database.experiments import ExperimentTable
from model_checkpoint.database.schema import latest_version, migrate
from model_checkpoint.database.sqlite import SQLiteConnection, SQLiteDialect
from model_checkpoint.database.tombstones import TombstoneTable
from model_checkpoint.errors import ConfigurationError, DatabaseError
from model_checkpoint.utils.fork import watch

_TIDY_EVERY = 32  # write transactions; a look at the log's size costs 2 us


class EnhancedDatabaseConnection:
    """A database of experiments and checkpoints, safe to use from many threads and, each with its own, processes.

    Args:
        database_url: ``sqlite:///relative/path.db``, ``sqlite:////absolute/path.db`` or ``sqlite:///:memory:``.
        pool_size: connections open at most; a thread that finds none free waits.
        busy_timeout: seconds to wait for another writer before an error.

    Attributes:
        experiments, checkpoints, tombstones: the tables.

    Raises:
        ConfigurationError: the URL or ``pool_size`` cannot be used.
        FormatVersionError: the database was written by a newer version of this package.
        DatabaseError: it cannot be opened.
    """

    def __init__(
        self, database_url: str = "sqlite:///experiments.db", pool_size: int = 5, busy_timeout: float = 30.0
    ) -> None:
        if pool_size < 1:
            raise ConfigurationError(f"pool_size must be at least 1, not {pool_size}")
        self.database_url = database_url
        self._dialect = _dialect(database_url, busy_timeout)
        self._size = 1 if self._dialect.shared_memory else pool_size
        self._local = threading.local()
        self._abandoned: list[object] = []
        self._transactions = 0
        self._new_pool()
        watch(self)
        try:
            if not self._up_to_date():
                with self.transaction() as connection:
                    migrate(connection, self._dialect.path)
        except BaseException:
            self.close()
            raise
        self.experiments = ExperimentTable(self)
        self.checkpoints = CheckpointTable(self)
        self.tombstones = TombstoneTable(self)

    def _up_to_date(self) -> bool:
        """Whether there is nothing to migrate, found out without the write lock."""
        if not self.query("SELECT 1 FROM sqlite_master WHERE name = 'migrations'"):
            return False
        return self.query("SELECT MAX(number) FROM migrations") == [(latest_version(),)]

    def _new_pool(self) -> None:
        self._local = threading.local()
        self._closed = False
        self._resting: list[SQLiteConnection | None] = []
        self._writing = threading.RLock()  # SQLite has one writer at a time; its threads queue here, not in a busy loop
        self._pool: LifoQueue[SQLiteConnection | None] = LifoQueue()  # None is a slot without a connection
        for _ in range(self._size):
            self._pool.put(None)

    def before_fork(self) -> None:
        """Let running statements end and close every connection.

        SQLite keeps note of a process's file locks in memory. A child that inherited the note, but not the locks, would
        take none of its own, and its commits could go to a log that the parent has deleted.
        """
        self._writing.acquire()
        if not self._dialect.shared_memory:
            inside = getattr(self._local, "connection", None) is not None  # a fork within a transaction: it stays out
            self._resting = [self._pool.get() for _ in range(self._size - inside)]
            for connection in self._resting:
                if connection is not None:
                    self._dialect.close(connection)

    def after_fork_in_parent(self) -> None:
        """Go on; connections are opened again when they are needed."""
        for _ in self._resting:
            self._pool.put(None)
        self._resting = []
        self._writing.release()

    def after_fork_in_child(self) -> None:
        """Start afresh; a database in memory is copied with the process."""
        if self._dialect.shared_memory:
            self._writing.release()
            return
        self._abandoned.append(self._local)
        self._new_pool()

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[SQLiteConnection]:
        """Run a block in a write transaction: committed when it ends, rolled back when it raises.

        Inside another transaction of the same thread it joins that one, which must be durable if this one is.

        Args:
            durable: whether the commit must survive power loss before this returns (a file sync). Without it the
                transaction is still atomic and survives the death of the process.

        Raises:
            DatabaseError: the database refused; nothing of the block was stored.
        """
        current: SQLiteConnection | None = getattr(self._local, "connection", None)
        if current is not None:
            if durable and not self._local.durable:
                raise DatabaseError("a durable transaction inside one that is not: make the outer one durable")
            yield current
            return
        self._writing.acquire()
        connection = None
        try:
            connection = self._pool.get() or self._connect()
            if connection.guard is not None:
                fcntl.flock(connection.guard, fcntl.LOCK_SH)
            sync, begin = self._dialect.begin[durable]
            connection.execute(sync)
            connection.execute(begin)
            self._local.connection, self._local.durable = connection, durable
            yield connection
            connection.execute("COMMIT")
        except self._dialect.driver_errors as error:
            raise self._failed(error) from error
        finally:
            if connection is not None:
                self._local.connection = None
                if connection.in_transaction:
                    connection.rollback()
                if connection.guard is not None:
                    fcntl.flock(connection.guard, fcntl.LOCK_UN)
                self._transactions += 1
                if self._transactions % _TIDY_EVERY == 0:
                    self._dialect.tidy(connection)
                self._pool.put(connection)
            self._writing.release()

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Return every row of a SELECT, in the running transaction of this thread if there is one.

        Args:
            sql: the statement, with ``:name`` binds.
            parameters: the values of the binds.

        Raises:
            DatabaseError: the database refused.
        """
        current: SQLiteConnection | None = getattr(self._local, "connection", None)
        connection = current or self._pool.get() or self._connect()
        try:
            return connection.execute(sql, parameters or {}).fetchall()
        except self._dialect.driver_errors as error:
            raise self._failed(error) from error
        finally:
            if current is None:
                self._pool.put(connection)

    def _connect(self) -> SQLiteConnection:
        try:
            if self._closed:
                raise DatabaseError(f"database {self._dialect.path} was closed; open it again to go on")
            return self._dialect.connect()
        except BaseException:
            self._pool.put(None)
            raise

    def _failed(self, error: Exception) -> DatabaseError:
        advice = (
            "another process holds it for long: raise busy_timeout" if "locked" in str(error) else "nothing was stored"
        )
        return DatabaseError(f"database {self._dialect.path}: {error}; {advice}")

    def close(self) -> None:
        """Close every connection, each when its transaction has ended. Closing twice does nothing.

        Raises:
            DatabaseError: this thread is inside a transaction.
        """
        if getattr(self._local, "connection", None) is not None:
            raise DatabaseError(f"database {self._dialect.path}: close() inside a transaction; leave it first")
        with self._writing:
            self._closed = True
            for connection in [self._pool.get() for _ in range(self._size)]:
                if connection is not None:
                    self._dialect.close(connection)
                self._pool.put(None)

    def __repr__(self) -> str:
        return f"EnhancedDatabaseConnection({self._dialect.name!r}, {self._dialect.path!r})"


def _dialect(url: str, busy_timeout: float) -> SQLiteDialect:
    if not isinstance(url, str) or "\0" in url:
        raise ConfigurationError(f"database_url must be text such as 'sqlite:///experiments.db', not {url!r}")
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return SQLiteDialect(rest[1:], busy_timeout)
    raise ConfigurationError(
        f"database_url with scheme {scheme!r} cannot be used; "
        "use 'sqlite:///file.db' (relative), 'sqlite:////absolute/file.db' or 'sqlite:///:memory:'"
    )
