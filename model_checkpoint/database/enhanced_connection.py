"""One door to the database, whichever it is: transactions that nest, queries, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from itertools import count
from typing import Any
from weakref import WeakMethod

from model_checkpoint.database.attempts import AttemptTable
from model_checkpoint.database.checkpoints import CheckpointTable
from model_checkpoint.database.claims import ClaimTable
from model_checkpoint.database.experiments import ExperimentTable
from model_checkpoint.database.metrics import MetricTable
from model_checkpoint.database.schema import Executes, check_version, latest_version
from model_checkpoint.database.stores import StoreTable
from model_checkpoint.database.tombstones import TombstoneTable
from model_checkpoint.database.verifications import VerificationTable
from model_checkpoint.errors import ConfigurationError, DatabaseError

# The scheme of a URL -> the class of its pool, loaded on use.
_POOLS = {
    "sqlite": "model_checkpoint.database.sqlite_pool:SQLitePool",
    "postgresql": "model_checkpoint.database.server_pool:ServerPool",
    "mysql": "model_checkpoint.database.server_pool:ServerPool",
}
UNFINISHED = "database {}: a transaction within this one raised, so that this one is undone, too; nothing was stored"


class EnhancedDatabaseConnection:
    """A database of experiments and checkpoints, safe to use from many threads and, each with its own, processes.

    Args:
        database_url: ``sqlite:///relative/path.db``, ``sqlite:////absolute/path.db``, ``sqlite:///:memory:``,
            ``postgresql://user:password@host:port/database`` (extra ``postgresql``) or ``mysql://...`` for MySQL and
            MariaDB (extra ``mysql``). What follows a ``?`` goes to the server's driver.
        pool_size: connections open at most, to a server at least one for writing and one for reading; a thread that
            finds none free waits.
        busy_timeout: seconds to wait for another writer, or for a free connection, before an error.
        create: whether a database that is not there is made. Without it, that is an error, and a file that this process
            may not write is opened all the same.

    Attributes:
        experiments, metrics, attempts, checkpoints, stores, tombstones, verifications, claims: the tables.
        place: where it is, for people: a path, or a URL without its passwords.
        in_memory: whether it ends with this object.
        max_name: characters of a metric's name, a tag or a project; what is a key on a server has to be short.

    Raises:
        ConfigurationError: the URL or ``pool_size`` cannot be used, or there is no database and ``create`` is False.
        MissingDependencyError: the extra of the server's database is not installed.
        FormatVersionError: the database was written by a newer version of this package.
        DatabaseError: it cannot be opened.
    """

    place: str
    in_memory = False
    max_name = 1 << 20  # characters
    text_tests: Mapping[str, str]  # how its SQL tests a text, with {column}, {text} and {length} in it

    def __new__(cls, database_url: str = "sqlite:///experiments.db", *_: Any, **__: Any) -> EnhancedDatabaseConnection:
        """Return the pool for the URL's scheme, as ``pathlib.Path`` returns the class of its platform."""
        return object.__new__(_pool(database_url) if cls is EnhancedDatabaseConnection else cls)

    def __init__(
        self,
        database_url: str = "sqlite:///experiments.db",
        pool_size: int = 5,
        busy_timeout: float = 30.0,
        create: bool = True,
    ) -> None:
        if pool_size < 1:
            raise ConfigurationError(f"pool_size must be at least 1, not {pool_size}")
        self.database_url = database_url
        self._closers: dict[int, WeakMethod[Callable[[], object]]] = {}  # in the order in which they came
        self._saves: set[int] = set()  # of these, those that wait for checkpoints
        self._told: list[WeakMethod[Callable[[DatabaseError], object]]] = []
        self._numbers = count()
        self._start(pool_size, busy_timeout, create)
        try:
            version = self._version()
            check_version(version, self.place)
            if version == 0 and not create:
                raise ConfigurationError(f"database {self.place} has no experiments in it; check the path or URL")
            if version < latest_version():
                self._migrate()
        except BaseException:
            self.close()
            raise
        self.experiments = ExperimentTable(self)
        self.metrics = MetricTable(self)
        self.attempts = AttemptTable(self)
        self.checkpoints = CheckpointTable(self)
        self.stores = StoreTable(self)
        self.tombstones = TombstoneTable(self)
        self.verifications = VerificationTable(self)
        self.claims = ClaimTable(self)

    def transaction(self, durable: bool = False, alone: bool = True) -> AbstractContextManager[Executes]:
        """Run a block in a write transaction: committed when it ends, rolled back when it raises.

        Inside another transaction of the same thread it joins that one, which must be durable if this one is. A block
        that raises there undoes the whole transaction, also when somebody catches the error within it.

        Args:
            durable: whether the commit must survive power loss before this returns (a file sync). Without it the
                transaction is still atomic and survives the death of the process. A server decides that itself.
            alone: whether no other such transaction, of any process, runs meanwhile. SQLite knows nothing else.

        Raises:
            DatabaseError: the database refused, and nothing of the block was stored. Where the server's answer to the
                commit itself was lost, whether it was stored is unknown, and the text says so.
        """
        raise NotImplementedError

    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, binary: bool = False
    ) -> list[tuple[Any, ...]]:
        """Return every row of a SELECT, in the running transaction of this thread if there is one.

        Outside a transaction the connection can only read, but for a database in memory, or with a pool of one.

        Args:
            sql: the statement, with ``:name`` binds.
            parameters: the values of the binds.
            binary: whether a column holds bytes. Elsewhere they are damage.

        Raises:
            DatabaseError: the database refused.
        """
        raise NotImplementedError

    def _start(self, pool_size: int, busy_timeout: float, create: bool) -> None:
        """Make the pool, and say ``place``."""
        raise NotImplementedError

    def _version(self) -> int:
        """Return the number of the last migration, 0 where there was none, without a write lock."""
        raise NotImplementedError

    def inside_transaction(self) -> bool:
        """Whether this thread is within a transaction."""
        raise NotImplementedError

    def _shut(self) -> None:
        """Close every connection, each when its transaction has ended."""
        raise NotImplementedError

    def _migrate(self) -> None:
        """Bring the schema up to date, each migration in one transaction with its record."""
        raise NotImplementedError

    def before_close(self, finish: Callable[[], object], saves: bool = False) -> None:
        """Call ``finish``, a method whose object this does not keep alive, before the connections are closed.

        Args:
            finish: called then, the last one given first.
            saves: whether it waits for checkpoints that are being saved, see ``settle``.
        """
        number = next(self._numbers)
        self._saves |= {number} if saves else set()
        self._closers[number] = WeakMethod(finish, lambda _: self._closers.pop(number, None))

    def settle(self, all_of_it: bool = False) -> None:
        """Wait until the checkpoints that are being saved are durable; or do all that comes before the closing."""
        with ExitStack() as stack:
            for number, closer in reversed(list(self._closers.items())):
                finish = closer()
                if finish is not None and (all_of_it or number in self._saves):
                    stack.callback(finish)

    def on_error(self, tell: Callable[[DatabaseError], object]) -> None:
        """Call ``tell``, a method whose object this does not keep alive, with every error of the driver from now on.

        It is called where the error came, within transactions and locks, and must neither wait nor raise.
        """
        self._told.append(WeakMethod(tell, self._told.remove))

    def _refused(self, text: str) -> DatabaseError:
        """Return the error for one of the driver's, of which those who asked are told."""
        error = DatabaseError(f"database {self.place}: {text}")
        for reference in list(self._told):
            tell = reference()
            if tell is not None:
                tell(error)
        return error

    def close(self) -> None:
        """Close every connection, each when its transaction has ended. Closing twice does nothing.

        Raises:
            DatabaseError: this thread is inside a transaction.
        """
        if self.inside_transaction():
            raise DatabaseError(f"database {self.place}: close() inside a transaction; leave it first")
        with ExitStack() as stack:  # all of it is done, whatever one of them raises
            stack.callback(self._shut)
            stack.callback(self.settle, all_of_it=True)

    def __repr__(self) -> str:
        return f"EnhancedDatabaseConnection({self.database_url.partition(':')[0]!r}, {self.place!r})"


def _pool(url: str) -> type[EnhancedDatabaseConnection]:
    if not isinstance(url, str) or "\0" in url:
        raise ConfigurationError(f"database_url must be text such as 'sqlite:///experiments.db', not {url!r}")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _POOLS:
        raise ConfigurationError(
            f"database_url with scheme {scheme!r} cannot be used; use 'sqlite:///file.db' (relative), "
            "'sqlite:////absolute/file.db', 'sqlite:///:memory:', 'postgresql://user@host/database' or "
            "'mysql://user@host/database'"
        )
    module, _, name = _POOLS[scheme].partition(":")
    found: type[EnhancedDatabaseConnection] = getattr(import_module(module), name)
    return found
