"""What the SQL of MySQL and MariaDB has of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from model_checkpoint.database.schema import Executes

_NAME = "CONCAT('model_checkpoint.', SHA1(DATABASE()))"  # of a lock: such names are the whole server's


class MySQLDialect:
    """See ``server_pool.Dialect``."""

    extra = "mysql"
    driver = "pymysql"
    drivername = "mysql+pymysql"
    # Table exists, duplicate column, duplicate key name, nothing to drop: it commits every step of DDL by itself.
    done_already = frozenset({1050, 1060, 1061, 1091})
    take_turn = "SELECT number FROM migrations WHERE number = 1 FOR UPDATE"
    lock_schema = f"SELECT GET_LOCK({_NAME}, :timeout)"
    unlock_schema = f"SELECT RELEASE_LOCK({_NAME})"

    read_only = "SET SESSION TRANSACTION READ ONLY"
    text_tests: ClassVar[dict[str, str]] = {
        "matches": "{column} REGEXP {text}",
        "contains": "LOCATE({text}, {column}) > 0",
        "startswith": "LEFT({column}, {length}) = {text}",
        "endswith": "RIGHT({column}, {length}) = {text}",
    }

    def types(self, connection: Executes) -> Mapping[str, str]:
        """Return what tables are made of.

        Text is compared byte by byte, trailing spaces included; the collation that does is named differently.
        """
        sql = (
            "SELECT collation_name FROM information_schema.collations "
            "WHERE collation_name IN ('utf8mb4_nopad_bin', 'utf8mb4_0900_bin')"
        )
        end = f" ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE {connection.execute(sql).fetchone()[0]}"
        return {
            "id": "VARCHAR(64)",
            "name": "VARCHAR(500)",
            "text": "LONGTEXT",
            "big": "BIGINT",
            "real": "DOUBLE",
            "blob": "LONGBLOB",
            "serial": "BIGINT AUTO_INCREMENT PRIMARY KEY",
            "prefix": "(100)",
            "end": end,
            "clustered": end,
        }

    def translate(self, sql: str) -> str:
        """Return ``sql`` with its upserts, which are SQLite's and PostgreSQL's, as MySQL says them."""
        sql = re.sub(r"ON CONFLICT \((\w+).*?\) DO NOTHING", r"ON DUPLICATE KEY UPDATE \1 = \1", sql)
        return re.sub(r"ON CONFLICT \(.*?\) DO UPDATE SET", "ON DUPLICATE KEY UPDATE", sql)

    def setting(self, timeout: float) -> str:
        """Return what a new connection is told."""
        return f"SET innodb_lock_wait_timeout = {max(1, round(timeout))}"

    def arguments(self, timeout: float) -> Mapping[str, int]:
        """Return nothing: PyMySQL knows no keepalives."""
        return {}

    def is_undone(self, connection: Any) -> bool:
        """Return False: a failed statement undoes itself only; a deadlock, which undoes all, is an error of its own."""
        return False

    def load(
        self, cursor: Callable[[], Any], table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Insert rows, as many in one statement as the driver sends."""
        with cursor() as opened:
            values = ", ".join(["%s"] * len(columns))
            opened.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})", rows)
