"""SQLite: how its connections are opened, and what guards its write-ahead log."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

from model_checkpoint.errors import ConfigurationError, DatabaseError

# Before 3.51.3 a WAL checkpoint that runs while another connection's commit resets the log can corrupt the file.
# There we turn automatic checkpoints off, hold a lock of ours shared in every write transaction, and run a checkpoint
# only while holding it exclusively. Source: release notes of SQLite 3.51.3, "WAL-reset bug".
_WAL_RESET_BUG = sqlite3.sqlite_version_info < (3, 51, 3)
_WAL_LIMIT = 4 << 20  # bytes of log after which a checkpoint is tried; SQLite's own default is 1,000 pages of 4 KiB


# File systems that several machines mount at once.
_NETWORKS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"}
_NETWORKS |= {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.juicefs"}
OURS = "SELECT 1 WHERE (SELECT COUNT(*) FROM sqlite_master WHERE name IN ('migrations', 'experiments')) = 2"
_LOGS = ("wal", "journal")
_WARNED: set[str] = set()  # databases, once in a process

log = logging.getLogger(__name__)


class SQLiteConnection(sqlite3.Connection):
    """A connection with the lock file of its database, where the SQLite library needs one, and the file's identity.

    Attributes:
        frozen: of a file that is read without locks, since nobody writes it, what it was like then.
    """

    guard: FileIO | None = None
    inode: int | None = None
    frozen: tuple[object, ...] | None = None

    def load(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], /) -> None:
        """See ``schema.Executes``."""
        self.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", rows)


class SQLiteDialect:
    """Opens SQLite databases.

    Args:
        path: the file, or ``:memory:``.
        busy_timeout: seconds that a statement waits for another writer.
        create: whether a file that is not there is made, or made ours; else one that cannot be written is opened, too.

    Attributes:
        types: what tables are made of, see ``schema.migrate_once``.
        in_memory: whether it is no file, so that every connection would be a database of its own.
        begin: the statements that open a write transaction, by whether its commit must survive power loss.
    """

    begin: ClassVar[dict[bool, tuple[str, str]]] = {
        True: ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
        False: ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
    }
    types: ClassVar[dict[str, str]] = {
        "id": "TEXT",
        "name": "TEXT",
        "text": "TEXT",
        "big": "INTEGER",
        "real": "REAL",
        "blob": "BLOB",
        "serial": "INTEGER PRIMARY KEY",
        "prefix": "",
        "end": "",
        "clustered": " WITHOUT ROWID",
    }
    text_tests: ClassVar[dict[str, str]] = {
        "matches": "{column} REGEXP {text}",
        "contains": "INSTR({column}, {text}) > 0",
        "startswith": "SUBSTR({column}, 1, {length}) = {text}",
        "endswith": "SUBSTR({column}, -{length}, {length}) = {text}",
    }
    # The second one comes from damaged text in the file.
    driver_errors: ClassVar[tuple[type[Exception], ...]] = (sqlite3.Error, UnicodeDecodeError)

    def __init__(self, path: str, busy_timeout: float, create: bool = True) -> None:
        self.in_memory = path == ":memory:"
        self.path = path if self.in_memory else os.path.abspath(path)
        self._busy_timeout = busy_timeout
        self._create = create

    def connect(self) -> SQLiteConnection:
        """Open a connection; any thread may use it, one at a time.

        Raises:
            ConfigurationError: the folder of the file does not exist.
            DatabaseError: it cannot be opened, or is no database.
        """
        folder = os.path.dirname(self.path)
        if not self.in_memory and not os.path.isdir(folder):
            raise ConfigurationError(f"cannot open database {self.path}: the folder {folder} does not exist; create it")
        connection: SQLiteConnection | None = None
        try:
            mode = self._mode()
            frozen = self.state() if "immutable" in mode else None
            connection = sqlite3.connect(
                self.path if self.in_memory else f"{Path(self.path).as_uri()}?mode={mode}",
                uri=not self.in_memory,
                timeout=self._busy_timeout,
                isolation_level=None,  # we say BEGIN and COMMIT ourselves
                check_same_thread=False,
                factory=SQLiteConnection,
                cached_statements=256,
            )
            connection.execute("PRAGMA schema_version")  # reads the file: an error here leaves nothing behind
            connection.execute("PRAGMA mmap_size=0")  # an I/O error in a mapping is SIGBUS, not an exception
            connection.execute("PRAGMA foreign_keys=ON")
            connection.create_function("regexp", 2, _matches, deterministic=True)
            if not self.in_memory:
                if mode == "rwc" or (mode == "rw" and connection.execute(OURS).fetchone()):
                    self._open_log(connection)
                connection.frozen = frozen
                connection.inode = os.stat(self.path).st_ino
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            if connection is not None:
                self.close(connection)
            raise DatabaseError(
                f"cannot open database {self.path}: {error}; check that it is a SQLite file and that it and its folder "
                "can be written; if it is damaged, move it away with its -wal and -shm files: checkpoints are found "
                "again by their manifests"
            ) from error
        return connection

    def _mode(self) -> str:
        """Return how to open the file.

        Who reads a database with a write-ahead log makes its log and index, if they are not there. A reader who may
        write the folder, but not the file, would leave some that its owner cannot write. Without a log, the file is
        only changed by somebody who makes one.

        Raises:
            OSError: it cannot be read as it is.
        """
        if self._create:
            return "rwc"
        if os.access(self.path, os.W_OK) and os.access(os.path.dirname(self.path), os.W_OK):
            return "rw"
        log, index = f"{self.path}-wal", f"{self.path}-shm"
        if not _uses_log(self.path, os.stat(self.path).st_ino) or (os.path.exists(log) and os.path.exists(index)):
            return "ro"
        if os.path.exists(log) and os.path.getsize(log):
            raise OSError(errno.EROFS, "part of it is in its -wal file; copy both to where they can be written", log)
        return "ro&immutable=1"

    def state(self) -> tuple[object, ...]:
        """Return what changes when somebody writes the file."""
        found = os.stat(self.path)
        logs = [os.path.exists(f"{self.path}-{kind}") and os.path.getsize(f"{self.path}-{kind}") for kind in _LOGS]
        return found.st_ino, found.st_size, found.st_mtime_ns, *logs

    def _open_log(self, connection: SQLiteConnection) -> None:
        kind = file_system(self.path)
        if kind in _NETWORKS:
            # The log's index is shared memory, which two machines do not share, and mapped, where an I/O error kills.
            connection.execute("PRAGMA journal_mode=DELETE")
            if self.path not in _WARNED:
                _WARNED.add(self.path)
                log.warning(
                    "database %s is on a network file system (%s), where SQLite's write-ahead log can lose or corrupt "
                    "data; the slower rollback journal is used. Put it on a local disk, or use a server",
                    *(self.path, kind),
                )
            return
        guard = open(f"{self.path}-lock", "ab", buffering=0)
        try:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                # SQLite does not wait for its busy timeout when two processes change a new file to WAL at once.
                fcntl.flock(guard, fcntl.LOCK_EX)
                connection.execute("PRAGMA journal_mode=WAL")
                fcntl.flock(guard, fcntl.LOCK_UN)
            connection.execute("PRAGMA journal_size_limit=0")  # a log that was checkpointed gives its space back
            if _WAL_RESET_BUG:
                connection.execute("PRAGMA wal_autocheckpoint=0")
                connection.guard = guard
        finally:
            if connection.guard is None:
                guard.close()

    def tidy(self, connection: SQLiteConnection) -> None:
        """Move a long write-ahead log into the database, when no transaction of any process runs."""
        if connection.guard is None:
            return
        try:
            if os.stat(f"{self.path}-wal").st_size < _WAL_LIMIT:
                return
            fcntl.flock(connection.guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # no log, or somebody writes: the next transaction tries again
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # never waits for readers
        except sqlite3.Error as error:
            log.warning("the log of %s could not be moved into it, it stays as it is: %s", self.path, error)
        finally:
            fcntl.flock(connection.guard, fcntl.LOCK_UN)

    def back_up(self, version: int) -> None:
        """Copy the file as it is committed to ``<file>.v<version>.backup``, before its schema changes.

        Raises:
            DatabaseError: it cannot be copied.
        """
        path = f"{self.path}.v{version}.backup"
        unfinished = f"{path}.unfinished"
        try:
            with (
                contextlib.closing(self.connect()) as source,
                contextlib.closing(sqlite3.connect(unfinished)) as target,
            ):
                source.backup(target)
            with open(unfinished, "rb") as copy:
                os.fsync(copy.fileno())
            os.replace(unfinished, path)
        except (sqlite3.Error, OSError, DatabaseError) as error:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise DatabaseError(
                f"database {self.path} has to be changed to a newer schema and cannot be copied to {path} before: "
                f"{error}; it stays as it is. Make room for the copy, or move the database"
            ) from error

    def close(self, connection: SQLiteConnection) -> None:
        """Close a connection. The last one checkpoints the log, which SQLite does only when it has the file alone."""
        connection.close()
        if connection.guard is not None:
            with contextlib.suppress(OSError):  # a lock: nothing was written to it, and the kernel has let go of it
                connection.guard.close()


@lru_cache(256)
def _uses_log(path: str, inode: int) -> bool:
    """Whether a file is a database with a write-ahead log; it is looked at once, before anything of ours reads it.

    A process that closes a file loses every lock that it has on it, also those of SQLite's connections.
    """
    with open(path, "rb") as file:
        return file.read(20)[18:] == b"\2\2"  # the file format's read and write version


def file_system(path: str, table: str = "/proc/self/mountinfo") -> str:
    """Return the kind of file system that ``path`` is on ("ext4"), or "" where that is not told.

    Args:
        path: an absolute path; what it names need not exist.
        table: where the kernel lists what is mounted.
    """
    found, best = "", ""
    path = os.path.realpath(path)
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                place, _, rest = line.partition(" - ")
                mounted = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place.split(" ")[4])
                if os.path.commonpath([path, mounted]) == mounted and len(mounted) >= len(best):
                    best, found = mounted, rest.split(" ")[0]
    except OSError:
        return ""  # no Linux
    return found


def _matches(pattern: str, text: str | None) -> bool:
    return text is not None and re.search(pattern, text) is not None
