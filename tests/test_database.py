"""EnhancedDatabaseConnection: URLs, durability settings, transactions, the pool, processes, forks, closing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import ExperimentTracker, Queries
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.database.sqlite import file_system
from model_checkpoint.errors import ConfigurationError, DatabaseError, FormatVersionError

ROOT = Path(__file__).parents[1]
DEADLINE = 30.0  # seconds that anything may take before it counts as hung


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def database(path: Path) -> Iterator[EnhancedDatabaseConnection]:
    connection = EnhancedDatabaseConnection(f"sqlite:///{path}")
    yield connection
    connection.close()


def open_files(path: Path) -> list[str]:
    """The files of one database that this process has open: the file itself, its log, its shared memory, our lock."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith(str(path)):
            found.append(target)
    return found


def put(database: EnhancedDatabaseConnection, *names: str) -> None:
    for name in names:
        database.experiments.create(ExperimentRecord(id=name, name=name))


def names_in(database: EnhancedDatabaseConnection) -> list[str]:
    return [name for (name,) in database.query("SELECT name FROM experiments ORDER BY name")]


# --- URLs and files ---------------------------------------------------------------------------------------------


def test_three_slashes_are_relative_to_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    database = EnhancedDatabaseConnection("sqlite:///runs.db")
    monkeypatch.chdir(tmp_path / "elsewhere")  # a later chdir must not make it another database
    put(database, "a")
    database.close()
    assert (tmp_path / "runs.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_four_slashes_are_absolute(path: Path) -> None:
    url = f"sqlite:///{path}"
    assert url.startswith("sqlite:////")
    database = EnhancedDatabaseConnection(url)
    put(database, "a")
    database.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM experiments").fetchall() == [("a",)]
    connection.close()


def test_the_default_is_experiments_db_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    EnhancedDatabaseConnection().close()
    assert (tmp_path / "experiments.db").exists()


def test_memory_is_one_database_for_all_threads_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    database = EnhancedDatabaseConnection("sqlite:///:memory:")
    threads = [threading.Thread(target=put, args=(database, f"e{i}")) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert names_in(database) == [f"e{i}" for i in range(6)]
    database.close()
    assert list(tmp_path.iterdir()) == []


def test_two_memory_databases_are_apart() -> None:
    first, second = (EnhancedDatabaseConnection("sqlite:///:memory:") for _ in range(2))
    put(first, "a")
    assert names_in(second) == []
    first.close()
    second.close()


def test_names_with_spaces_and_other_signs_work(tmp_path: Path) -> None:
    path = tmp_path / "a b%20?mode=ro#größe.db"
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    put(database, "a")
    database.close()
    assert path.exists()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "experiments.db",
        "/tmp/experiments.db",
        "sqlite:experiments.db",
        "sqlite://experiments.db",
        "sqlite:///",
        "file:///experiments.db",
        "oracle://u:p@host/db",
        "SQLITE",
    ],
)
def test_a_wrong_url_is_a_value_error_that_says_what_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"database_url.*use 'sqlite:///file\.db'") as caught:
        EnhancedDatabaseConnection(url)
    assert isinstance(caught.value, ConfigurationError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", [None, 5, "sqlite:///a\0b.db"], ids=repr)
def test_a_url_that_is_no_usable_text_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="database_url"):
        EnhancedDatabaseConnection(url)


def test_a_password_in_a_refused_url_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        EnhancedDatabaseConnection("oracle://user:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -1])
def test_a_pool_without_a_connection_is_refused(path: Path, size: int) -> None:
    with pytest.raises(ConfigurationError, match="pool_size"):
        EnhancedDatabaseConnection(f"sqlite:///{path}", pool_size=size)


def test_a_file_that_is_no_database_is_refused_by_name_and_left_as_it_is(path: Path) -> None:
    content = b"lr,loss\n0.1,2.0\n" * 200
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"runs\.db.*not a database"):
        EnhancedDatabaseConnection(f"sqlite:///{path}")
    assert path.read_bytes() == content
    assert open_files(path) == []


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"folder .*nowhere does not exist"):
        EnhancedDatabaseConnection(f"sqlite:///{tmp_path}/nowhere/runs.db")
    assert not (tmp_path / "nowhere").exists()


def test_reading_and_resuming_make_no_database_where_the_path_names_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/experimnets.db"
    for open_it in (lambda: Queries(url), lambda: ExperimentTracker.resume("an id", url)):
        with pytest.raises(ConfigurationError, match=r"there is no database .*experimnets\.db; check the path"):
            open_it()
    assert list(tmp_path.iterdir()) == []


def test_the_database_of_another_program_is_not_taken_for_one_of_experiments(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE migrations (number INTEGER)")
        other.execute("INSERT INTO migrations VALUES (3)")
        other.commit()
    content = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"mlflow.db has no experiments in it; check the path"):
        Queries(f"sqlite:///{path}")
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write a folder: by its mode, and where root needs more than that, by a mount."""
    if os.geteuid():
        folder.chmod(0o555)
        for file in folder.iterdir():
            file.chmod(0o444)
    elif subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
        pytest.skip("a read-only mount cannot be made here, and root writes everything else")
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", "-l", folder], check=True)


def test_a_database_that_may_not_be_written_can_be_asked(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    url = f"sqlite:///{folder}/runs of 2025?.db"
    with ExperimentTracker("old", database_url=url) as run:
        run.log_metric("loss", 0.5)
    with read_only(folder):
        with Queries(url) as queries:
            assert [found.id for found in queries.search_experiments("metrics.loss == 0.5")] == [run.experiment_id]
        with pytest.raises(DatabaseError, match="readonly database; this process may not write it"):
            ExperimentTracker.resume(run.experiment_id, url)
        with pytest.raises(DatabaseError, match="can be written"):
            ExperimentTracker("new", database_url=url)
        assert sorted(path.name for path in folder.iterdir()) == ["runs of 2025?.db", "runs of 2025?.db-lock"]


def test_a_frozen_database_whose_log_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    run = ExperimentTracker("old", database_url=f"sqlite:///{tmp_path}/runs.db")
    for name in ("runs.db", "runs.db-wal"):  # as it is copied while somebody writes
        shutil.copy(tmp_path / name, folder / name)
    run.close()
    with read_only(folder), pytest.raises(DatabaseError, match=r"part of it is in its -wal file; copy both"):
        Queries(f"sqlite:///{folder}/runs.db")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users reach; those of pytest are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


OF_ANOTHER_USER = """
import os, sys
from model_checkpoint import Queries
from model_checkpoint.database.models import ExperimentRecord
import encodings.idna, model_checkpoint.database.sqlite_pool, model_checkpoint.query.groups
if not os.geteuid():
    os.setgid(65534)
    os.setuid(65534)
with Queries(sys.argv[1]) as queries:
    for _ in sys.stdin:
        print(len(queries.search_experiments()), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="two users are needed, so root")
@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_who_reads_the_database_of_another_user_sees_what_is_there_and_leaves_nothing(shared: Path, mode: int) -> None:
    url = f"sqlite:///{shared}/runs.db"
    ExperimentTracker("first", database_url=url).close()
    shared.chmod(mode)
    reader = subprocess.Popen(
        [sys.executable, "-c", OF_ANOTHER_USER, url], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    with reader:
        for expected in (1, 2, 3):
            reader.stdin.write("look\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{expected}\n"
            ExperimentTracker("next", database_url=url).close()
    assert {file.stat().st_uid for file in shared.iterdir()} == {0}


def test_a_database_of_an_older_version_that_may_not_be_written_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "golden" / "database_v3.db", folder / "old.db")
    with (
        read_only(folder),
        pytest.raises(DatabaseError, match=r"old\.db was written by an older version of this package"),
    ):
        Queries(f"sqlite:///{folder}/old.db")


def test_a_directory_in_place_of_the_file_is_refused_by_name(path: Path) -> None:
    path.mkdir()
    with pytest.raises(DatabaseError, match=r"runs\.db"):
        EnhancedDatabaseConnection(f"sqlite:///{path}")
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("cut", [100, 4096 + 7])
def test_a_truncated_database_is_an_error_by_type(path: Path, cut: int) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    put(database, *(f"e{i}" for i in range(50)))
    database.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(DatabaseError, match=r"runs\.db"):
        EnhancedDatabaseConnection(f"sqlite:///{path}").query("SELECT * FROM experiments")


def test_repr_names_the_database_and_its_kind(database: EnhancedDatabaseConnection, path: Path) -> None:
    assert repr(database) == f"EnhancedDatabaseConnection('sqlite', {str(path)!r})"


# --- settings ---------------------------------------------------------------------------------------------------


def pragma(connection: Any, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_log_is_wal_mappings_are_off_and_foreign_keys_are_on(database: EnhancedDatabaseConnection) -> None:
    with database.transaction() as connection:
        assert pragma(connection, "journal_mode") == "wal"
        assert pragma(connection, "mmap_size") == 0
        assert pragma(connection, "foreign_keys") == 1


def test_a_durable_transaction_syncs_fully_also_after_one_that_did_not(database: EnhancedDatabaseConnection) -> None:
    found = []
    for durable in (True, False, True):
        with database.transaction(durable=durable) as connection:
            found.append(pragma(connection, "synchronous"))
    assert found == [2, 1, 2]  # FULL, NORMAL, FULL


def test_every_connection_of_the_pool_has_the_settings(database: EnhancedDatabaseConnection) -> None:
    together = threading.Barrier(5)  # five readers at once need five connections
    found = []

    def read() -> None:
        together.wait(DEADLINE)
        found.append([database.query(f"PRAGMA {name}")[0][0] for name in ("mmap_size", "foreign_keys")])

    threads = [threading.Thread(target=read) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert found == [[0, 1]] * 5


def test_a_row_that_refers_to_nothing_is_refused(database: EnhancedDatabaseConnection) -> None:
    with pytest.raises(DatabaseError, match="FOREIGN KEY"):
        with database.transaction() as connection:
            connection.execute("INSERT INTO tags (experiment_id, tag, position) VALUES ('nobody', 't', 0)")
    assert database.query("SELECT COUNT(*) FROM tags") == [(0,)]


def test_an_sql_error_is_a_database_error_that_names_the_file_and_has_its_cause(
    database: EnhancedDatabaseConnection,
) -> None:
    with pytest.raises(DatabaseError, match=r"runs\.db.*no such table") as caught:
        database.query("SELECT * FROM nowhere")
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    with pytest.raises(DatabaseError, match=r"runs\.db.*syntax error"):
        with database.transaction() as connection:
            connection.execute("INSERT LOVE")
    put(database, "a")  # the connection is still good
    assert names_in(database) == ["a"]


# --- transactions -----------------------------------------------------------------------------------------------

INSERT = "INSERT INTO stores (id, path) VALUES (:id, '')"


def stores(database: EnhancedDatabaseConnection) -> list[str]:
    return [store for (store,) in database.query("SELECT id FROM stores ORDER BY id")]


def test_a_transaction_commits_when_its_block_ends(database: EnhancedDatabaseConnection, path: Path) -> None:
    other = EnhancedDatabaseConnection(f"sqlite:///{path}")
    with database.transaction() as connection:
        connection.execute(INSERT, {"id": "a"})
        assert stores(database) == ["a"]  # a query of this thread sees what the transaction did
        assert stores(other) == []
    assert stores(other) == ["a"]
    other.close()


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_transaction_rolls_back_when_its_block_raises(
    database: EnhancedDatabaseConnection, raised: type[BaseException]
) -> None:
    def crash() -> None:
        with database.transaction() as connection:
            connection.execute(INSERT, {"id": "a"})
            raise raised

    with pytest.raises(raised):
        crash()
    assert stores(database) == []
    with database.transaction() as connection:
        connection.execute(INSERT, {"id": "b"})
    assert stores(database) == ["b"]


def test_an_inner_transaction_joins_and_commits_with_the_outer(
    database: EnhancedDatabaseConnection, path: Path
) -> None:
    other = EnhancedDatabaseConnection(f"sqlite:///{path}")
    with database.transaction(durable=True) as outer:
        outer.execute(INSERT, {"id": "a"})
        with database.transaction() as inner:
            assert inner is outer
            inner.execute(INSERT, {"id": "b"})
        assert stores(other) == []
    assert stores(other) == ["a", "b"]
    other.close()


def test_a_rollback_of_the_outer_undoes_the_inner(database: EnhancedDatabaseConnection) -> None:
    def crash() -> None:
        with database.transaction(durable=True):
            with database.transaction() as inner:
                inner.execute(INSERT, {"id": "a"})
            put(database, "e")  # the tables' own calls join, too
            raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        crash()
    assert (stores(database), names_in(database)) == ([], [])


def test_a_durable_transaction_within_one_that_is_not_is_refused(database: EnhancedDatabaseConnection) -> None:
    """It could not keep its promise: how a commit is synced is decided when the outer one begins."""
    with pytest.raises(DatabaseError, match="outer one durable"):
        with database.transaction(), database.transaction(durable=True):
            pytest.fail("the block must not run")
    with database.transaction(durable=True), database.transaction(durable=True) as connection:
        assert pragma(connection, "synchronous") == 2


def test_an_exception_through_both_rolls_back_both(database: EnhancedDatabaseConnection) -> None:
    def crash() -> None:
        with database.transaction() as outer:
            outer.execute(INSERT, {"id": "a"})
            with database.transaction() as inner:
                inner.execute(INSERT, {"id": "b"})
                raise RuntimeError("inner")

    with pytest.raises(RuntimeError, match="inner"):
        crash()
    assert stores(database) == []


def test_a_write_transaction_takes_its_lock_at_the_start(database: EnhancedDatabaseConnection, path: Path) -> None:
    """A deferred one would fail half way, when two that have read both want to write."""
    blocked = EnhancedDatabaseConnection(f"sqlite:///{path}", busy_timeout=0.02)
    with database.transaction():
        with pytest.raises(DatabaseError, match=r"locked.*busy_timeout"):
            with blocked.transaction():
                pytest.fail("the block must not run")
    with blocked.transaction() as connection:
        connection.execute(INSERT, {"id": "later"})
    assert stores(database) == ["later"]
    blocked.close()


def test_readers_go_on_while_another_writes(database: EnhancedDatabaseConnection, path: Path) -> None:
    reader = EnhancedDatabaseConnection(f"sqlite:///{path}", busy_timeout=0.02)
    put(database, "a")
    with database.transaction() as connection:
        connection.execute("UPDATE experiments SET name = 'b'")
        assert names_in(reader) == ["a"]
    assert names_in(reader) == ["b"]
    reader.close()


def test_opening_does_not_wait_for_a_writer(database: EnhancedDatabaseConnection, path: Path) -> None:
    """A stopped writer must not keep others from looking at the runs."""
    put(database, "a")
    found: list[list[str]] = []
    done = threading.Event()

    def look() -> None:
        reader = EnhancedDatabaseConnection(f"sqlite:///{path}", busy_timeout=0.02)
        found.append(names_in(reader))
        done.set()
        reader.close()

    thread = threading.Thread(target=look)
    with database.transaction() as connection:
        connection.execute("UPDATE experiments SET name = 'b'")
        thread.start()
        in_time = done.wait(3)
    thread.join(DEADLINE)
    assert in_time
    assert found == [["a"]]


FULL_DISK = """
import os, resource, sys
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite
path = sys.argv[1]
database = EnhancedDatabaseConnection("sqlite:///" + path)
with database.transaction() as connection:
    connection.execute("CREATE TABLE ballast (number INTEGER PRIMARY KEY, content BLOB)")
    connection.execute("INSERT INTO ballast VALUES (-1, zeroblob(3000000))")
database.close()  # which moves the log into the file: it is 3 MB from now on
database = EnhancedDatabaseConnection("sqlite:///" + path, pool_size=1)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (6_500_000, hard))
for number in range(80):  # 5 MB: the log may have them, the file may not grow so far
    with database.transaction() as connection:
        connection.execute("INSERT INTO ballast VALUES (?, zeroblob(64000))", (number,))
print(database.query("SELECT COUNT(*) FROM ballast"))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
with database.transaction() as connection:
    connection.execute("INSERT INTO ballast VALUES (1000, NULL)")
database.close()
"""


def test_what_was_committed_is_not_reported_as_failed_when_the_log_cannot_be_moved(path: Path) -> None:
    """Whoever is told that a commit failed writes it again, and has it twice."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(81,)]"
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM ballast").fetchone() == (82,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_the_log_does_not_grow_for_ever(database: EnhancedDatabaseConnection, path: Path) -> None:
    for number in range(200):  # 20 MB through the log
        with database.transaction() as connection:
            connection.execute(
                "INSERT INTO stores (id, path) VALUES ('s', :path) ON CONFLICT (id) DO UPDATE SET path = :path",
                {"path": f"{number:0100000}"},
            )
    assert Path(f"{path}-wal").stat().st_size < 12 << 20


# --- the pool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_twenty_threads_never_open_more_than_pool_size_connections(path: Path, size: int) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}", pool_size=size)
    start = threading.Barrier(20)
    most, failures = [], []

    def work(worker: int) -> None:
        try:
            start.wait(DEADLINE)
            for i in range(10):
                put(database, f"{worker:02}-{i}")
                database.query("SELECT COUNT(*) FROM experiments")
                most.append(open_files(path).count(str(path)))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert failures == []
    assert len(names_in(database)) == 200
    assert 1 <= max(most) <= size
    database.close()
    assert open_files(path) == []


def test_a_thread_waits_for_a_free_connection(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}", pool_size=1)
    got = threading.Event()

    def read() -> None:
        database.query("SELECT 1")
        got.set()

    with database.transaction():
        thread = threading.Thread(target=read)
        thread.start()
        assert not got.wait(0.05)
    assert got.wait(DEADLINE)
    thread.join(DEADLINE)
    database.close()


def test_a_connection_that_could_not_be_opened_gives_its_place_back(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    database = EnhancedDatabaseConnection(f"sqlite:///{home}/runs.db", pool_size=2)
    refused = []

    def ask() -> None:
        try:
            database.query("SELECT 1")
        except (DatabaseError, ConfigurationError) as error:
            refused.append(str(error))

    with database.transaction():  # holds the only open connection, so that every question needs a new one
        home.rename(away)
        try:
            for _ in range(4):  # more often than there are places
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join(DEADLINE)
                assert not thread.is_alive()
        finally:
            away.rename(home)
    assert len(refused) == 4
    assert all("home" in text for text in refused)
    assert database.query("SELECT 1") == [(1,)]
    database.close()
    assert open_files(home) == []


# --- versions ---------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("user", ["database", "tracker", "resume"])
def test_a_database_of_a_newer_version_is_refused_by_name_and_unchanged(path: Path, user: str) -> None:
    url = f"sqlite:///{path}"
    database = EnhancedDatabaseConnection(url)
    put(database, "a")
    with database.transaction() as connection:
        connection.execute("INSERT INTO migrations VALUES (99, 'from_the_future', 0.0)")
    database.close()
    before = digest(path)
    open_it = {
        "database": lambda: EnhancedDatabaseConnection(url),
        "tracker": lambda: ExperimentTracker("n", database_url=url),
        "resume": lambda: ExperimentTracker.resume("a", url),
    }[user]
    with pytest.raises(FormatVersionError, match=r"runs\.db.*99.*Upgrade") as caught:
        open_it()
    assert (caught.value.found, isinstance(caught.value, RuntimeError)) == (99, True)
    assert caught.value.known < 99
    assert digest(path) == before
    assert sorted(p.name for p in path.parent.iterdir()) in (["runs.db"], ["runs.db", "runs.db-lock"])


def test_a_refused_database_leaves_no_file_open(path: Path) -> None:
    url = f"sqlite:///{path}"
    database = EnhancedDatabaseConnection(url)
    with database.transaction() as connection:
        connection.execute("INSERT INTO migrations VALUES (99, 'from_the_future', 0.0)")
    database.close()
    with pytest.raises(FormatVersionError):
        EnhancedDatabaseConnection(url)
    assert open_files(path) == []


def test_opening_again_applies_no_migration_twice_and_keeps_what_is_there(path: Path) -> None:
    url = f"sqlite:///{path}"
    for expected in ([], ["e0"], ["e0", "e1"]):
        database = EnhancedDatabaseConnection(url)
        assert names_in(database) == expected
        numbers = [number for (number,) in database.query("SELECT number FROM migrations ORDER BY number")]
        assert numbers == list(range(1, len(numbers) + 1))
        put(database, f"e{len(expected)}")
        database.close()


# --- processes --------------------------------------------------------------------------------------------------


def run_together(script: str, *arguments: str, count: int = 8) -> list[tuple[int, str]]:
    """Run a script in ``count`` processes that begin at the same moment; returns exit codes and standard errors.

    They are fresh interpreters without pytest: eight of those would take seconds to start.
    """
    wait = "print('ready', flush=True); sys.stdin.readline()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script.replace("WAIT", wait), str(worker), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate(timeout=DEADLINE)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [
            (process.returncode, errors)
            for process, (_, errors) in [(process, process.communicate(timeout=DEADLINE)) for process in processes]
        ]
    finally:
        for process in processes:
            process.kill()


OPEN = """
import sys
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.database.sqlite import file_system
worker, url = sys.argv[1:]
WAIT
database = EnhancedDatabaseConnection(url)
database.experiments.create(ExperimentRecord(id=f"e{worker}", name=f"e{worker}"))
database.close()
"""


def test_eight_processes_open_a_new_database_at_once(path: Path) -> None:
    url = f"sqlite:///{path}"
    assert run_together(OPEN, url) == [(0, "")] * 8
    database = EnhancedDatabaseConnection(url)
    assert names_in(database) == [f"e{worker}" for worker in range(8)]
    numbers = [number for (number,) in database.query("SELECT number FROM migrations ORDER BY number")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 1
    database.close()


WRITE = """
import sys
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite
worker, url, count = sys.argv[1:]
database = EnhancedDatabaseConnection(url)
WAIT
for i in range(int(count)):
    with database.transaction(durable=i % 50 == 0) as connection:
        (total,) = connection.execute("SELECT revision FROM stores WHERE id = 'counter'").fetchone()
        connection.execute("UPDATE stores SET revision = :next WHERE id = 'counter'", {"next": total + 1})
        connection.execute("INSERT INTO stores (id, path) VALUES (:id, '')", {"id": f"{worker}-{i:04}"})
database.close()
"""


def test_eight_processes_write_at_once_without_an_error_and_none_is_lost(path: Path) -> None:
    url, count = f"sqlite:///{path}", 250
    database = EnhancedDatabaseConnection(url)
    with database.transaction() as connection:
        connection.execute(INSERT, {"id": "counter"})
    assert run_together(WRITE, url, str(count)) == [(0, "")] * 8
    # Read, add one, write: any lost update would show in the counter.
    assert database.query("SELECT revision FROM stores WHERE id = 'counter'") == [(8 * count,)]
    assert database.query("SELECT COUNT(*) FROM stores") == [(8 * count + 1,)]
    assert database.query("PRAGMA integrity_check") == [("ok",)]
    database.close()


FORK = """
import os, sys
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.database.sqlite import file_system

database = EnhancedDatabaseConnection(sys.argv[1])
put = lambda name: database.experiments.create(ExperimentRecord(id=name, name=name))
put("before")
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        database.query("SELECT COUNT(*) FROM experiments")
        for i in range(5):
            put(f"child {number} {i}")
        if sys.argv[2] == "close":
            database.close()
        (os._exit if sys.argv[2] == "hard" else sys.exit)(0)
    children.append(child)
    for i in range(5):
        put(f"parent {number} {i}")
for child in children:
    assert os.waitpid(child, 0)[1] == 0
put("after")
print(database.query("SELECT COUNT(*) FROM experiments")[0][0])
print(database.query("PRAGMA integrity_check")[0][0])
database.close()
"""


@pytest.mark.parametrize("ending", ["hard", "soft", "close"])
def test_a_forked_child_uses_the_database_and_the_parent_goes_on(path: Path, ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, f"sqlite:///{path}", ending],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["32", "ok"]


FORK_DURING = """
import os, sys, threading
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite

database = EnhancedDatabaseConnection(sys.argv[1], busy_timeout=5.0)
insert = "INSERT INTO stores (id, path) VALUES (:id, '')"
stop, running = threading.Event(), threading.Event()

def write():
    number = 0
    while not stop.is_set():
        with database.transaction() as connection:
            running.set()
            connection.execute(insert, {"id": f"thread {number}"})
            stop.wait(0.02)  # most forks fall into a transaction
        number += 1
        stop.wait(0.005)  # and here the children have their turn

thread = threading.Thread(target=write)
thread.start()
running.wait()
children = []
for worker in range(5):
    child = os.fork()
    if child == 0:
        with database.transaction() as connection:
            connection.execute(insert, {"id": f"child {worker}"})
        os._exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
stop.set()
thread.join()
print(codes)
print(database.query("SELECT COUNT(*) FROM stores WHERE id LIKE 'child%'")[0][0])
"""


def test_children_forked_while_a_thread_writes_can_write(path: Path) -> None:
    """SQLite keeps a table of its locks in memory: a child that inherits it with a lock taken waits for ever."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_DURING, f"sqlite:///{path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str([0] * 5), "5"], done.stderr


def test_transactions_nest_through_context_managers_of_others(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")

    @contextlib.contextmanager
    def wrapped() -> Iterator[None]:
        with database.transaction(durable=True):
            yield

    def fail_inside() -> None:
        with wrapped():
            put(database, "lost")
            raise ZeroDivisionError

    with wrapped():
        put(database, "wrapped")
    with contextlib.ExitStack() as stack:
        stack.enter_context(database.transaction(durable=True))
        put(database, "stacked")
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert names_in(database) == ["stacked", "wrapped"]
    database.close()


@pytest.mark.parametrize("sound", [100, 4096], ids=["the header is sound", "the first page is sound"])
def test_a_damaged_database_is_a_database_error_naming_the_file(path: Path, sound: int) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    put(database, "a")
    database.close()
    content = path.read_bytes()
    path.write_bytes(content[:sound] + b"\xff" * (len(content) - sound))
    with pytest.raises(DatabaseError, match=r"runs\.db"):
        EnhancedDatabaseConnection(f"sqlite:///{path}")
    assert open_files(path) == []


FORK_THEN_CLOSE = """
import os, sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

folder = sys.argv[1]
tracker = ExperimentTracker("fork", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c")
manager.save_checkpoint({"n": 0})
saved, say_saved = os.pipe()
closed, say_closed = os.pipe()
child = os.fork()
if child == 0:
    manager.save_checkpoint({"n": 1})
    os.write(say_saved, b"1")
    os.read(closed, 1)
    manager.save_checkpoint({"n": 2})
    tracker.log_metric("loss", 0.5)
    tracker.flush()
    manager.delete_checkpoint(manager.list_checkpoints()[0]["checkpoint_id"])
    os._exit(0)
os.read(saved, 1)
tracker.close()
os.write(say_closed, b"1")
print(os.waitpid(child, 0)[1], tracker.experiment_id)
"""


def test_what_a_forked_child_stores_survives_that_the_parent_closes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_THEN_CLOSE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    code, experiment = done.stdout.split() or ("", "")
    assert code == "0", done.stderr
    database = EnhancedDatabaseConnection(f"sqlite:///{tmp_path}/e.db")
    assert [value for _, value, *_ in database.metrics.points(experiment)] == [0.5]
    found = database.checkpoints.of_experiment(experiment)
    assert [record.sequence for record in found] == [2, 3]
    database.close()


FORK_FROM_TWO_THREADS = """
import os, sys, threading
from model_checkpoint.database import EnhancedDatabaseConnection, sqlite

database = EnhancedDatabaseConnection(sys.argv[1])
codes = []

def fork() -> None:
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with database.transaction() as connection:
                connection.execute("INSERT INTO stores (id, path) VALUES (:id, '')", {"id": str(os.getpid())})
            os._exit(0)
        codes.append(os.waitpid(child, 0)[1])

threads = [threading.Thread(target=fork) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(codes == [0] * 40, database.query("SELECT COUNT(*) FROM stores")[0][0])
"""


def test_two_threads_that_fork_at_once_neither_hang_nor_spoil_a_child(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_FROM_TWO_THREADS, f"sqlite:///{path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.stdout.split() == ["True", "40"], done.stderr


# --- closing ----------------------------------------------------------------------------------------------------


def test_nothing_is_left_open_and_the_log_is_gone_after_close(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    put(database, "a")
    assert open_files(path)
    database.close()
    assert open_files(path) == []
    assert {p.name for p in path.parent.iterdir()} <= {"runs.db", "runs.db-lock"}


def test_close_twice_does_nothing_and_use_after_close_is_a_clear_error(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    database.close()
    database.close()
    with pytest.raises(DatabaseError, match="was closed; open it again"):
        database.query("SELECT 1")
    with pytest.raises(DatabaseError, match="was closed; open it again"):
        with database.transaction():
            pytest.fail("the block must not run")
    assert open_files(path) == []


def test_close_in_one_thread_lets_the_transaction_of_another_end_well(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}")
    inside, closing = threading.Event(), threading.Event()

    def write() -> None:
        with database.transaction() as connection:
            connection.execute(INSERT, {"id": "a"})
            inside.set()
            closing.wait(DEADLINE)

    def close() -> None:
        closing.set()
        database.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(DEADLINE)
    closer = threading.Thread(target=close)
    closer.start()
    writer.join(DEADLINE)
    closer.join(DEADLINE)
    assert not writer.is_alive()
    assert not closer.is_alive()
    assert open_files(path) == []
    again = EnhancedDatabaseConnection(f"sqlite:///{path}")
    assert stores(again) == ["a"]
    again.close()


def test_threads_that_wait_for_a_connection_are_told_of_the_close(path: Path) -> None:
    database = EnhancedDatabaseConnection(f"sqlite:///{path}", pool_size=1)
    inside, end = threading.Event(), threading.Event()
    outcomes = []

    def hold() -> None:
        with database.transaction():
            inside.set()
            end.wait(DEADLINE)

    def ask() -> None:
        try:
            outcomes.append(database.query("SELECT 1"))
        except DatabaseError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=hold), *(threading.Thread(target=ask) for _ in range(4))]
    threads[0].start()
    assert inside.wait(DEADLINE)
    for thread in threads[1:]:
        thread.start()
    closer = threading.Thread(target=database.close)
    closer.start()
    end.set()
    for thread in [*threads, closer]:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    # Who came before the close has an answer, who came after it an error; nobody waits for ever.
    assert len(outcomes) == 4
    assert all(outcome == [(1,)] or "was closed" in outcome for outcome in outcomes)
    assert open_files(path) == []


class InterruptedLock:
    """A lock; a Ctrl-C comes right after it was taken for the first time."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.interrupted = lock, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)

    def acquire(self) -> None:
        self.lock.acquire()
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt


def test_a_ctrl_c_right_after_the_write_lock_was_taken_leaves_it_free(tmp_path: Path) -> None:
    db = EnhancedDatabaseConnection(f"sqlite:///{tmp_path}/e.db")
    db._writer.lock = InterruptedLock(db._writer.lock)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt), db.transaction():
        raise AssertionError("never")
    entered = threading.Event()

    def write() -> None:
        with db.transaction():
            entered.set()

    other = threading.Thread(target=write, daemon=True)
    other.start()
    assert entered.wait(DEADLINE)
    other.join(DEADLINE)
    db._writer.lock = db._writer.lock.lock  # type: ignore[attr-defined]
    db.close()


# --- network file systems ---------------------------------------------------------------------------------------

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 22 0:40 / /data rw - nfs4 server:/data rw
36 35 0:41 / /data/local\\040disk rw - xfs /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/runs.db", "nfs4"),
        ("/data/local disk/a/runs.db", "xfs"),
        ("/database/runs.db", "ext4"),
        ("/runs.db", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path, path: str, kind: str) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    assert file_system(path, str(table)) == kind
    assert file_system(path, str(tmp_path / "nothing")) == ""


def test_on_a_network_file_system_there_is_no_write_ahead_log_and_a_warning_says_why(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No such file system can be mounted here: what the kernel tells of the mount is the one thing that is not real."""
    with ExperimentTracker("before", database_url=f"sqlite:///{path}"):
        pass  # it was on a local disk, and has a log
    monkeypatch.setattr(sqlite, "file_system", lambda path: "nfs4")
    with ExperimentTracker("run", database_url=f"sqlite:///{path}") as run:
        run.log_metric("loss", 1.0)
        assert run.database.query("PRAGMA journal_mode") == [("delete",)]
        assert not Path(f"{path}-wal").exists()
        assert [point["metric_value"] for point in run.get_metrics()] == [1.0]
    told = [record.message for record in caplog.records if "network file system (nfs4)" in record.message]
    assert len(told) == 1
    assert str(path) in told[0]


# --- backups ----------------------------------------------------------------------------------------------------


def test_a_file_is_copied_before_its_schema_changes(path: Path) -> None:
    shutil.copy(ROOT / "tests" / "golden" / "database_v1.db", path)
    EnhancedDatabaseConnection(f"sqlite:///{path}").close()
    backup = Path(f"{path}.v1.backup")
    with contextlib.closing(sqlite3.connect(backup)) as connection:
        assert connection.execute("SELECT MAX(number) FROM migrations").fetchone() == (1,)
        assert connection.execute("SELECT COUNT(*) > 0 FROM metric_points").fetchone() == (1,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    at = backup.stat().st_mtime_ns
    EnhancedDatabaseConnection(f"sqlite:///{path}").close()
    assert backup.stat().st_mtime_ns == at
    assert [each.name for each in path.parent.glob("*backup*")] == [backup.name]


def test_a_file_that_cannot_be_copied_is_not_changed(path: Path) -> None:
    shutil.copy(ROOT / "tests" / "golden" / "database_v1.db", path)
    Path(f"{path}.v1.backup").mkdir()
    with pytest.raises(DatabaseError, match="it stays as it is"):
        EnhancedDatabaseConnection(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT MAX(number) FROM migrations").fetchone() == (1,)


def test_a_new_database_has_no_backup(path: Path) -> None:
    EnhancedDatabaseConnection(f"sqlite:///{path}").close()
    assert [each.name for each in path.parent.iterdir() if "backup" in each.name] == []
