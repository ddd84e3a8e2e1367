"""Databases for the tests: a file, and a schema of its own on a real PostgreSQL and a real MySQL or MariaDB server."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import sqlalchemy

KINDS = ("sqlite", "postgresql", "mysql")

# Kind -> where tests look when the variable is not set, and how such a server is started.
_LOCAL = {
    "postgresql": (
        "postgresql://postgres@127.0.0.1:5432/test",
        "docker run -p 5432:5432 -e POSTGRES_DB=test -e POSTGRES_HOST_AUTH_METHOD=trust postgres",
    ),
    "mysql": (
        "mysql://root@127.0.0.1:3306/test",
        "docker run -p 3306:3306 -e MARIADB_DATABASE=test -e MARIADB_ALLOW_EMPTY_ROOT_PASSWORD=1 mariadb",
    ),
}


@cache
def _server(kind: str) -> tuple[str, str]:
    """Return the URL of the server, and why it cannot be used ("" when it can)."""
    variable = f"MODEL_CHECKPOINT_TEST_{kind.upper()}_URL"
    url = os.environ.get(variable) or _LOCAL[kind][0]
    try:
        with _engine(url).connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        return url, f"no {kind} server for tests ({reason}); set {variable}, or start one: {_LOCAL[kind][1]}"
    return url, ""


def _engine(url: str) -> sqlalchemy.Engine:
    drivers = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
    made = sqlalchemy.make_url(url)
    return sqlalchemy.create_engine(
        made.set(drivername=drivers[made.drivername]),
        isolation_level="AUTOCOMMIT",
        poolclass=sqlalchemy.NullPool,
        connect_args={"connect_timeout": 5},
    )


def run(url: str, *statements: str) -> list[tuple[object, ...]]:
    """Run statements on a server, as somebody else; returns the rows of the last one."""
    rows: list[tuple[object, ...]] = []
    with _engine(url).connect() as connection:
        for statement in statements:
            result = connection.execute(sqlalchemy.text(statement))
            rows = [tuple(row) for row in result] if result.returns_rows else []
    return rows


@contextmanager
def new_database(kind: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database, which is gone afterwards; skips where there is no such server."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/runs.db"
        return
    server, problem = _server(kind)
    if problem:
        if os.environ.get("MODEL_CHECKPOINT_REQUIRE_SERVERS") == "1":
            pytest.fail(problem)
        pytest.skip(problem)
    name = f"mc_{uuid.uuid4().hex[:16]}"
    run(server, f"CREATE SCHEMA {name}")
    try:
        url = sqlalchemy.make_url(server)
        if kind == "mysql":
            url = url.set(database=name)
        else:
            url = url.update_query_dict({"options": f"-csearch_path={name}", "application_name": name})
        yield url.render_as_string(hide_password=False)
    finally:
        run(server, f"DROP SCHEMA {name}" + (" CASCADE" if kind == "postgresql" else ""))


def cut_connections(url: str) -> None:
    """End every other connection to the database of a test, as an administrator or a restart does."""
    if url.startswith("mysql"):
        others = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        for (number,) in run(url, others):
            run(url, f"KILL {number}")
    else:
        mine = "application_name = current_setting('application_name') AND pid <> pg_backend_pid()"
        run(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")


class Proxy:
    """Stands between a client and a server, and breaks their connections when it is told to.

    Args:
        url: the server's. ``self.url`` is the proxy's.
    """

    def __init__(self, url: str) -> None:
        made = sqlalchemy.make_url(url)
        self._target = (made.host, made.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = made.set(port=self._listener.getsockname()[1], host="127.0.0.1").render_as_string(False)
        self.is_down = False
        self.cut_at: re.Pattern[bytes] | None = None  # what the client says: it is passed on, and the answer is not
        self.cut_after = 0  # how often it may be said before
        self.cuts = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def take_down(self) -> None:
        """Break every connection and take no new ones."""
        self.is_down = True
        with self._lock:
            for each in self._open:
                _shut(each)

    def bring_up(self) -> None:
        """Take connections again."""
        self.is_down = False

    def close(self) -> None:
        """End."""
        self.take_down()
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            server = socket.create_connection(self._target)
            with self._lock:
                self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target, source is client), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                word = self.cut_at
                if from_client and word and word.search(data):
                    if self.cut_after:
                        self.cut_after -= 1
                    else:
                        self.cut_at = None
                        self.cuts += 1
                        _shut(source)  # the client hears nothing more; the server hears this
                target.sendall(data)
        # What the server was sent is worked off before it notices that nobody is there.
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
