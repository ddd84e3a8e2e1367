"""One door to the database: a pool of connections, transactions that nest, and the tables."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import CO_GENERATOR
from itertools import chain, compress, cycle
from operator import attrgetter, methodcaller
from types import FrameType
from typing import Any
from weakref import WeakMethod

from model_checkpoint.database.checkpoints import CheckpointTable
from model_checkpoint.database.experiments import ExperimentTable
from model_checkpoint.database.schema import latest_version, migrate
from model_checkpoint.database.sqlite import SQLiteConnection, SQLiteDialect
from model_checkpoint.database.tombstones import TombstoneTable
from model_checkpoint.errors import ConfigurationError, DatabaseError
from model_checkpoint.utils.fork import watch


class _Slot:
    """A place for one connection, which is used by who holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.connection: SQLiteConnection | None = None
        self.busy = False


_GONE = (
    "database {} was deleted or replaced while it was open; nothing was stored, it would be lost with the last close. "
    "Put it back, or close this and open it again"
)
_DAMAGED = "it is damaged: move it away with its -wal and -shm files; manifests bring the checkpoints back"
_CONTEXTLIB = {contextlib._GeneratorContextManager.__enter__.__code__, contextlib.ExitStack.enter_context.__code__}
_ACQUIRE, _RELEASE, _LOCK = methodcaller("acquire"), methodcaller("release"), attrgetter("lock")
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
        self._size = 1 if self._dialect.in_memory else pool_size
        self._transactions = 0
        self._durable = False  # whether the running transaction is
        self._running: object = None  # that transaction, and the frame whose with block it is
        self._block: FrameType | None = None
        self._new_pool()
        self._closers: list[WeakMethod[Callable[[], object]]] = []
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
        with self._writer.lock:
            connection = self._open(self._writer)
            try:
                if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone():
                    return False
                (number,) = connection.execute("SELECT MAX(number) FROM migrations").fetchone()
            except self._dialect.driver_errors as error:
                raise self._failed(error) from error
            return bool(number == latest_version())

    def _new_pool(self) -> None:
        self._closed = False
        self._resting: list[_Slot] = []
        self._abandoned: SQLiteConnection | None = None
        # One slot for transactions, since SQLite has one writer at a time; the others for reading.
        self._writer = _Slot()
        self._readers = [_Slot() for _ in range(self._size - 1)] or [self._writer]
        self._turns = cycle(self._readers)

    def before_fork(self) -> None:
        """Let running statements end and close every connection.

        SQLite keeps note of a process's file locks in memory. A child that inherited the note, but not the locks, would
        take none of its own, and its commits could go to a log that the parent has deleted.
        """
        inside = self._inside()  # a fork within a transaction: that connection stays
        for slot in self._slots():
            # Taken and noted in one call of C, or a Ctrl-C between the two would leave the lock taken for good.
            self._resting.extend(compress([slot], map(_ACQUIRE, [slot.lock])))
            if not self._dialect.in_memory and not (inside and slot is self._writer):
                self._close_slot(slot)

    def after_fork_in_parent(self) -> None:
        """Go on; connections are opened again when they are needed."""
        while self._resting:
            deque(map(_RELEASE, map(_LOCK, map(self._resting.pop, [-1]))), maxlen=0)  # in one call of C, too

    def after_fork_in_child(self) -> None:
        """Start afresh; a database in memory is copied with the process."""
        if self._dialect.in_memory:
            self._writer.lock = threading.RLock()
            self._resting = []
            return
        inherited = self._writer.connection
        self._new_pool()
        self._abandoned = inherited  # not used here, and not closed either: that would undo the parent's locks

    def _slots(self) -> list[_Slot]:
        return list(dict.fromkeys([self._writer, *self._readers]))

    def _inside(self) -> bool:
        """Whether this thread is in a transaction whose ``with`` block is still being executed.

        A Ctrl-C can come between the lines of contextlib, and leave a transaction open that nobody will end before its
        traceback is gone. Its block is no longer on the stack then, which is how it is told from a living one.
        """
        if not self._writer.lock._is_owned():  # type: ignore[attr-defined]
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._block:
            frame = frame.f_back
        return frame is not None

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
        if self._writer.lock._is_owned() and self._inside():  # type: ignore[attr-defined]
            if durable and not self._durable:
                raise DatabaseError("a durable transaction inside one that is not: make the outer one durable")
            yield self._open(self._writer)
            return
        while self._writer.lock._is_owned():  # type: ignore[attr-defined]
            self._writer.lock.release()  # left by an interrupt
        mine = object()
        try:
            self._writer.lock.acquire()
            self._running = mine
            self._block = sys._getframe(1)
            # Not contextlib's frames, and not those of other context managers around this one: they come and go.
            while self._block and (self._block.f_code.co_flags & CO_GENERATOR or self._block.f_code in _CONTEXTLIB):
                self._block = self._block.f_back
            connection = self._writer.connection or self._open(self._writer)
            path = self._dialect.path
            if connection.inode and not (os.path.exists(path) and os.stat(path).st_ino == connection.inode):
                raise DatabaseError(_GONE.format(path))
            if connection.in_transaction:
                connection.rollback()  # left by an interrupt
            if connection.guard is not None:
                fcntl.flock(connection.guard, fcntl.LOCK_SH)
            for statement in self._dialect.begin[durable]:
                connection.execute(statement)
            self._durable = durable
            yield connection
            connection.execute("COMMIT")
        except self._dialect.driver_errors as error:
            raise self._failed(error) from error
        finally:
            if self._running is mine:  # otherwise an interrupt came in the way, and a later transaction tidied up
                self._end()
            elif self._running is None and self._writer.lock._is_owned():  # type: ignore[attr-defined]
                self._writer.lock.release()  # an interrupt came right after it was taken

    def _end(self) -> None:
        connection = self._writer.connection
        try:
            if connection is not None and connection.in_transaction:
                connection.rollback()
            if connection is not None and connection.guard is not None:
                fcntl.flock(connection.guard, fcntl.LOCK_UN)
            self._transactions += 1
            if connection is not None and self._transactions % _TIDY_EVERY == 0:
                self._dialect.tidy(connection)
        finally:
            self._running = self._block = None
            self._writer.lock.release()

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Return every row of a SELECT, in the running transaction of this thread if there is one.

        Args:
            sql: the statement, with ``:name`` binds.
            parameters: the values of the binds.

        Raises:
            DatabaseError: the database refused.
        """
        slot = self._writer
        if not self._inside():
            slot = next((slot for slot in self._readers if not slot.busy), None) or next(self._turns)
        with slot.lock:
            slot.busy = True
            try:
                rows: list[tuple[Any, ...]] = self._open(slot).execute(sql, parameters or {}).fetchall()
                if bytes in set(map(type, chain.from_iterable(rows))):  # we store none
                    raise DatabaseError(f"database {self._dialect.path} holds bytes where text was; {_DAMAGED}")
                return rows
            except self._dialect.driver_errors as error:
                raise self._failed(error) from error
            finally:
                slot.busy = False

    def _open(self, slot: _Slot) -> SQLiteConnection:
        if slot.connection is None:
            if self._closed:
                raise DatabaseError(f"database {self._dialect.path} was closed; open it again to go on")
            slot.connection = self._dialect.connect()
        return slot.connection

    def _close_slot(self, slot: _Slot) -> None:
        connection, slot.connection = slot.connection, None
        if connection is not None:
            self._dialect.close(connection)

    def _failed(self, error: Exception) -> DatabaseError:
        advice = "nothing was stored"
        if "locked" in str(error):
            advice = "another process holds it for long: raise busy_timeout"
        elif "malformed" in str(error) or "not a database" in str(error):
            advice = _DAMAGED
        return DatabaseError(f"database {self._dialect.path}: {error}; {advice}")

    def before_close(self, finish: Callable[[], object]) -> None:
        """Call ``finish``, a method whose object this does not keep alive, before the connections are closed."""
        self._closers = [*(known for known in self._closers if known() is not None), WeakMethod(finish)]

    def close(self) -> None:
        """Close every connection, each when its transaction has ended. Closing twice does nothing.

        Raises:
            DatabaseError: this thread is inside a transaction.
        """
        if self._inside():
            raise DatabaseError(f"database {self._dialect.path}: close() inside a transaction; leave it first")
        for closer in self._closers:
            finish = closer()
            if finish is not None:
                finish()
        self._closed = True
        for slot in self._slots():
            with slot.lock:
                self._close_slot(slot)

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
