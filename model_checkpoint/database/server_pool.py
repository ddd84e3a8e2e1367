"""Databases on a server, through SQLAlchemy: its pool, its URLs and its drivers; the SQL is ours."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, ClassVar, Protocol

from model_checkpoint.database.enhanced_connection import UNFINISHED, EnhancedDatabaseConnection
from model_checkpoint.database.mysql import MySQLDialect
from model_checkpoint.database.postgresql import PostgreSQLDialect
from model_checkpoint.database.schema import Executes, migrate_once
from model_checkpoint.errors import ConfigurationError, DatabaseError
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.optional import require


class Dialect(Protocol):
    """What one server's SQL has of its own.

    Attributes:
        extra: the pip extra that brings the driver.
        driver: its module.
        drivername: what SQLAlchemy calls server and driver in a URL.
        take_turn: the statement that waits until no other transaction that has run it is open.
        lock_schema, unlock_schema: those around a migration, which return 1; ``:timeout`` is in seconds.
        read_only: the statement after which a connection can only read.
        done_already: the error codes of a step of a migration that an interrupted one has done already.
    """

    extra: str
    driver: str
    drivername: str
    done_already: frozenset[int]
    read_only: str
    text_tests: ClassVar[dict[str, str]]
    take_turn: str
    lock_schema: str
    unlock_schema: str

    def types(self, connection: Executes) -> Mapping[str, str]:
        """Return what tables are made of, see ``schema.migrate_once``."""

    def translate(self, sql: str) -> str:
        """Return a statement of ours in the server's SQL."""

    def load(
        self, cursor: Callable[[], Any], table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Insert rows with a cursor of the driver's."""

    def setting(self, timeout: float) -> str:
        """Return the statement that lets a new connection wait ``timeout`` seconds for a lock at most."""

    def arguments(self, timeout: float) -> Mapping[str, int]:
        """Return what the driver is told, unless the URL says it, so that a silent server is noticed at ``timeout``."""

    def is_undone(self, connection: Any) -> bool:
        """Return whether a failed statement has made the server undo the transaction of a driver's connection."""


_CONNECT_TIMEOUT = 10  # seconds, where the URL does not say
_SECRETS = re.compile("pass|secret|scram")  # parts of a URL's query that nobody is shown
_SHORT = 4_000  # characters of a statement that is kept prepared; with 30,000 binds in it, it takes megabytes
_DIALECTS: dict[str, type[Dialect]] = {"postgresql": PostgreSQLDialect, "mysql": MySQLDialect}


class ServerPool(EnhancedDatabaseConnection):
    """A database on a PostgreSQL, MySQL or MariaDB server; see ``EnhancedDatabaseConnection``."""

    max_name = 500  # 2,000 bytes at most; a key of PostgreSQL has 2,704, one of InnoDB 3,072 with its experiment's id

    def _start(self, pool_size: int, busy_timeout: float, create: bool) -> None:
        self._dialect = _DIALECTS[self.database_url.partition(":")[0]]()
        purpose = f"a database_url that begins with {self.database_url.partition(':')[0]}://"
        self._sqlalchemy = require("sqlalchemy", self._dialect.extra, purpose)
        self._driver = require(self._dialect.driver, self._dialect.extra, purpose)
        try:
            url = self._sqlalchemy.make_url(self.database_url)
        except (self._sqlalchemy.exc.ArgumentError, ValueError):
            raise ConfigurationError(
                "database_url cannot be understood (it is not shown, it may hold a password): "
                "'postgresql://user:password@host:5432/database', with special characters in the password as %40"
            ) from None
        secrets = [name for name in url.query if _SECRETS.search(name.lower())]
        self.place = url.difference_update_query(secrets).render_as_string(hide_password=True)
        if not url.database:
            raise ConfigurationError(f"database_url {self.place} names no database; add /name behind its host")
        self.text_tests = self._dialect.text_tests
        values = [value for name in secrets for value in url.normalized_query[name]]
        self._secrets = [str(value) for value in (url.password, *values) if value]
        self._timeout = busy_timeout
        writers = max(1, pool_size // 3)
        told = self._dialect.setting(busy_timeout)
        self._engine = self._make_engine(url, writers, [told], "READ COMMITTED")
        # Filters of users run on connections that cannot write, whatever comes through.
        readers = [told, self._dialect.read_only]
        self._reader = self._make_engine(url, max(1, pool_size - writers), readers, "AUTOCOMMIT")
        self._mine = threading.local()
        self._closed = False
        watch(self)

    def _make_engine(self, url: Any, size: int, told: Sequence[str], isolation_level: str) -> Any:
        arguments = {"connect_timeout": _CONNECT_TIMEOUT, **self._dialect.arguments(self._timeout)}
        engine = self._sqlalchemy.create_engine(
            url.set(drivername=self._dialect.drivername),
            connect_args={name: value for name, value in arguments.items() if name not in url.query},
            isolation_level=isolation_level,  # a look after a lock was taken sees what its last holder has written
            pool_size=size,
            max_overflow=0,
            pool_timeout=self._timeout,
            pool_pre_ping=True,  # a connection that the server has closed while it rested is replaced, not an error
            hide_parameters=True,  # errors are shown to people and kept in logs
        )
        self._sqlalchemy.event.listen(engine, "connect", partial(_tell, told))
        return engine

    def before_fork(self) -> None:
        """Nothing: connections stay the parent's."""

    def after_fork_in_parent(self) -> None:
        """Nothing was changed."""

    def after_fork_in_child(self) -> None:
        """Start with connections of its own; the parent's are not closed here, which would end them there."""
        self._engine.dispose(close=False)
        self._reader.dispose(close=False)
        self._mine = threading.local()

    def inside_transaction(self) -> bool:
        return getattr(self._mine, "connection", None) is not None

    @contextmanager
    def transaction(self, durable: bool = False, alone: bool = True) -> Iterator[Executes]:
        """See ``EnhancedDatabaseConnection``; ``durable`` is the server's own setting."""
        if self.inside_transaction():
            if alone and not self._mine.alone:
                raise DatabaseError("a transaction that is alone inside one that is not: make the outer one so")
            self._mine.unfinished += 1
            yield self._mine.connection
            self._mine.unfinished -= 1
            return
        with self._errors(), self._engine.connect() as raw:  # rolled back where it is not committed
            connection = _Connection(raw, self._dialect)
            if alone:
                connection.execute(self._dialect.take_turn)
            self._mine.connection, self._mine.alone, self._mine.unfinished = connection, alone, 0
            try:
                yield connection
            finally:
                self._mine.connection = None
            if self._mine.unfinished:
                raise DatabaseError(UNFINISHED.format(self.place))
            self._commit(raw)

    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, binary: bool = False
    ) -> list[tuple[Any, ...]]:
        """See ``EnhancedDatabaseConnection``."""
        with self._errors():
            if self.inside_transaction():
                return [tuple(row) for row in self._mine.connection.execute(sql, parameters or {})]
            with self._reader.connect() as raw:
                return [tuple(row) for row in _Connection(raw, self._dialect).execute(sql, parameters or {})]

    def _version(self) -> int:
        with self._errors():
            if not self._sqlalchemy.inspect(self._reader).has_table("migrations"):
                return 0
        ((number,),) = self.query("SELECT COALESCE(MAX(number), 0) FROM migrations")
        return int(number)

    def _migrate(self) -> None:
        more = True
        while more:
            with self._errors(), self._engine.connect() as raw:
                connection = _MigratingConnection(raw, self._dialect)
                if not connection.execute(self._dialect.lock_schema, {"timeout": self._timeout}).scalar():
                    raise DatabaseError(f"database {self.place}: another process migrates it for long; try again")
                try:
                    more = migrate_once(connection, self.place, self._dialect.types(connection))
                    self._commit(raw)
                finally:
                    raw.rollback()
                    connection.execute(self._dialect.unlock_schema)

    def _shut(self) -> None:
        self._closed = True
        self._engine.dispose()
        self._reader.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._closed:
            raise DatabaseError(f"database {self.place} was closed; open it again to go on")
        try:
            yield
        except (self._sqlalchemy.exc.SQLAlchemyError, self._driver.Error) as error:
            raise self._failure(error, "nothing was stored") from None

    def _commit(self, raw: Any) -> None:
        if self._dialect.is_undone(raw.connection.dbapi_connection):  # a commit would be a rollback, and say nothing
            raise DatabaseError(f"database {self.place}: a statement in the transaction failed; nothing was stored")
        try:
            raw.commit()
        except (self._sqlalchemy.exc.SQLAlchemyError, self._driver.Error) as error:
            raise self._failure(error, "whether it was stored is unknown, look before you try again") from None

    def _failure(self, error: Exception, outcome: str) -> DatabaseError:
        text = " ".join(str(getattr(error, "orig", None) or error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return self._refused(f"{text}; {outcome}")


class _Connection:
    """Runs our statements on a connection of SQLAlchemy's."""

    def __init__(self, raw: Any, dialect: Dialect) -> None:
        self.raw = raw
        self._dialect = dialect

    def execute(self, sql: str, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {}, /) -> Any:
        translate = self._dialect.translate
        prepared = _prepared(translate, sql) if len(sql) <= _SHORT else _unkept()(translate(sql))
        return self.raw.execute(prepared, parameters)

    def executemany(self, sql: str, parameters: Sequence[Mapping[str, Any]], /) -> Any:
        if parameters:
            self.execute(sql, parameters)

    def load(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], /) -> None:
        """See ``schema.Executes``."""
        self._dialect.load(self.raw.connection.cursor, table, columns, rows)


class _MigratingConnection(_Connection):
    """Passes over the steps that an interrupted migration has done, where a server commits each by itself."""

    def execute(self, sql: str, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {}, /) -> Any:
        from sqlalchemy.exc import DBAPIError

        try:
            return super().execute(sql, parameters)
        except DBAPIError as error:
            if not error.orig or not error.orig.args or error.orig.args[0] not in self._dialect.done_already:
                raise


def _tell(statements: Sequence[str], connection: Any, _: object) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.commit()


@lru_cache(512)
def _prepared(translate: Any, sql: str) -> Any:
    from sqlalchemy import text

    return text(translate(sql))


@lru_cache(1)
def _unkept() -> Any:
    """Return the class of a statement that is not kept in SQLAlchemy's own cache either."""
    from sqlalchemy import TextClause

    return type("Unkept", (TextClause,), {"inherit_cache": False})
