"""The pool of a SQLite database: one connection writes, others read; a fork or a Ctrl-C leaves no lock behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import CO_GENERATOR
from itertools import chain, compress, cycle
from operator import attrgetter, methodcaller
from types import FrameType
from typing import Any

from model_checkpoint.database.enhanced_connection import UNFINISHED, EnhancedDatabaseConnection
from model_checkpoint.database.schema import latest_version, migrate_once, version_of
from model_checkpoint.database.sqlite import OURS, SQLiteConnection, SQLiteDialect
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


class SQLitePool(EnhancedDatabaseConnection):
    """A SQLite database; see ``EnhancedDatabaseConnection``."""

    def _start(self, pool_size: int, busy_timeout: float, create: bool) -> None:
        rest = self.database_url.partition("://")[2]
        if not (rest.startswith("/") and len(rest) > 1):
            raise ConfigurationError(
                f"database_url {self.database_url!r} names no file; use 'sqlite:///file.db' (relative), "
                "'sqlite:////absolute/file.db' or 'sqlite:///:memory:'"
            )
        self._dialect = SQLiteDialect(rest[1:], busy_timeout, create)
        if not (create or os.path.exists(self._dialect.path)):
            raise ConfigurationError(f"there is no database {self._dialect.path}; check the path")
        self.text_tests = self._dialect.text_tests
        self.place, self.in_memory = self._dialect.path, self._dialect.in_memory
        self._size = 1 if self._dialect.in_memory else pool_size
        self._transactions = 0
        self._durable = False  # whether the running transaction is
        self._unfinished = 0  # blocks within it that did not come to their end
        self._running: object = None  # that transaction, and the frame whose with block it is
        self._block: FrameType | None = None
        self._new_pool()
        watch(self)

    def _version(self) -> int:
        with self._writer.lock:
            connection = self._open(self._writer)
            try:
                if not connection.execute(OURS).fetchone():
                    return 0
                return int(connection.execute("SELECT COALESCE(MAX(number), 0) FROM migrations").fetchone()[0])
            except self._dialect.driver_errors as error:
                raise self._failed(error) from error

    def _migrate(self) -> None:
        if not (self.in_memory or os.access(self.place, os.W_OK)):
            raise DatabaseError(
                f"database {self.place} was written by an older version of this package, and this process may not "
                "change its schema; open it once with one that may write it"
            )
        more, copied = True, self.in_memory
        while more:
            with self.transaction(durable=True) as connection:
                version = version_of(connection, self._dialect.types)
                if not copied and 0 < version < latest_version():
                    self._dialect.back_up(version)
                copied = True
                more = migrate_once(connection, self.place, self._dialect.types)

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
        inside = self.inside_transaction()  # a fork within a transaction: that connection stays
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

    def inside_transaction(self) -> bool:
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
    def transaction(self, durable: bool = False, alone: bool = True) -> Iterator[SQLiteConnection]:
        """See ``EnhancedDatabaseConnection``; every transaction has the database alone."""
        if self._writer.lock._is_owned() and self.inside_transaction():  # type: ignore[attr-defined]
            if durable and not self._durable:
                raise DatabaseError("a durable transaction inside one that is not: make the outer one durable")
            self._unfinished += 1
            yield self._open(self._writer)
            self._unfinished -= 1
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
            self._durable, self._unfinished = durable, 0
            yield connection
            if self._unfinished:
                raise DatabaseError(UNFINISHED.format(path))
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

    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, binary: bool = False
    ) -> list[tuple[Any, ...]]:
        """See ``EnhancedDatabaseConnection``."""
        slot = self._writer
        if not self.inside_transaction():
            slot = next((slot for slot in self._readers if not slot.busy), None) or next(self._turns)
        with slot.lock:
            slot.busy = True
            try:
                connection = self._open(slot)
                if connection.frozen is None:
                    rows: list[tuple[Any, ...]] = connection.execute(sql, parameters or {}).fetchall()
                else:
                    rows = self._read_frozen(slot, sql, parameters or {})
                if not binary and bytes in set(map(type, chain.from_iterable(rows))):  # we store none
                    raise DatabaseError(f"database {self._dialect.path} holds bytes where text was; {_DAMAGED}")
                return rows
            except self._dialect.driver_errors as error:
                raise self._failed(error) from error
            finally:
                slot.busy = False

    def _read_frozen(self, slot: _Slot, sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the rows that are there at one moment, of a file that is read without locks."""
        while True:
            connection = self._open(slot)
            error = None
            try:
                rows: list[tuple[Any, ...]] = connection.execute(sql, parameters).fetchall()
            except self._dialect.driver_errors as problem:
                error = problem
            if connection.frozen in (None, self._dialect.state()):
                if error is not None:
                    raise error
                return rows
            self._close_slot(slot)  # somebody wrote it meanwhile

    def _open(self, slot: _Slot) -> SQLiteConnection:
        if slot.connection is None:
            if self._closed:
                raise DatabaseError(f"database {self._dialect.path} was closed; open it again to go on")
            slot.connection = self._dialect.connect()
            if slot is not self._writer:  # filters of users run there; whatever comes through cannot write
                slot.connection.execute("PRAGMA query_only=ON")
        return slot.connection

    def _close_slot(self, slot: _Slot) -> None:
        connection, slot.connection = slot.connection, None
        if connection is not None:
            self._dialect.close(connection)

    def _failed(self, error: Exception) -> DatabaseError:
        advice = "nothing was stored"
        if "locked" in str(error):
            advice = "another process holds it for long: raise busy_timeout"
        elif "readonly" in str(error):
            advice = "this process may not write it; nothing was stored"
        elif "malformed" in str(error) or "not a database" in str(error):
            advice = _DAMAGED
        return self._refused(f"{error}; {advice}")

    def _shut(self) -> None:
        self._closed = True
        for slot in self._slots():
            with slot.lock:
                self._close_slot(slot)
