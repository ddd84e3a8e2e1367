"""What holds on every database: SQLite, PostgreSQL, and MySQL or MariaDB, each a real one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from model_checkpoint import ExperimentTracker, Queries
from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.database import EnhancedDatabaseConnection, schema
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError, DatabaseError, FormatVersionError
from tests.servers import KINDS, Proxy, cut_connections, new_database, run

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0  # seconds that anything may take before it counts as hung
SERVERS = KINDS[1:]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture(params=SERVERS)
def server_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def database(url: str) -> Iterator[EnhancedDatabaseConnection]:
    database = EnhancedDatabaseConnection(url)
    yield database
    database.close()


def put(database: EnhancedDatabaseConnection, *names: str) -> None:
    for name in names:
        database.experiments.create(ExperimentRecord(id=name, name=name))


def names_in(database: EnhancedDatabaseConnection) -> list[str]:
    return sorted(name for (name,) in database.query("SELECT name FROM experiments"))


def in_processes(code: str, *arguments: str, count: int = 8) -> list[str]:
    """Run ``code`` in processes at once; returns what each printed."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments, str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    ended = [process.communicate(timeout=DEADLINE) for process in running]
    assert [process.returncode for process in running] == [0] * count, [error for _, error in ended]
    return [output for output, _ in ended]


# --- transactions -----------------------------------------------------------------------------------------------


def test_a_transaction_commits_when_its_block_ends_and_rolls_back_when_it_raises(
    database: EnhancedDatabaseConnection, url: str
) -> None:
    def crash() -> None:
        with database.transaction():
            put(database, "lost")
            raise RuntimeError("no")

    with database.transaction(durable=True):
        put(database, "kept")
    with pytest.raises(RuntimeError, match="no"):
        crash()
    other = EnhancedDatabaseConnection(url)
    assert names_in(other) == ["kept"]
    other.close()


def test_an_inner_transaction_that_raised_undoes_the_outer_one_although_it_was_caught(
    database: EnhancedDatabaseConnection,
) -> None:
    def crash() -> None:
        with database.transaction(durable=True):
            put(database, "inner")
            raise RuntimeError("no")

    def catch() -> None:
        with database.transaction(durable=True):
            put(database, "outer")
            with contextlib.suppress(RuntimeError):
                crash()

    with pytest.raises(DatabaseError, match=r"within this one raised.*nothing was stored"):
        catch()
    assert names_in(database) == []
    with database.transaction(durable=True):
        put(database, "later")
    assert names_in(database) == ["later"]


def test_an_inner_transaction_is_undone_with_the_outer(database: EnhancedDatabaseConnection) -> None:
    def crash() -> None:
        with database.transaction(durable=True):
            put(database, "outer")
            with database.transaction(durable=True):
                put(database, "inner")
            assert names_in(database) == ["inner", "outer"]  # a query sees what its transaction has done
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        crash()
    assert names_in(database) == []


def test_others_see_nothing_of_a_transaction_before_its_end(database: EnhancedDatabaseConnection, url: str) -> None:
    other = EnhancedDatabaseConnection(url)
    with database.transaction(durable=True):
        put(database, "a")
        assert names_in(other) == []
    assert names_in(other) == ["a"]
    other.close()


def test_of_two_transactions_the_second_waits_for_the_first(database: EnhancedDatabaseConnection, url: str) -> None:
    other, entered, order = EnhancedDatabaseConnection(url), threading.Event(), []

    def second() -> None:
        entered.set()
        with other.transaction():
            order.append("second")

    thread = threading.Thread(target=second)
    with database.transaction():
        thread.start()
        assert entered.wait(DEADLINE)
        put_other = other.query("SELECT COUNT(*) FROM experiments")  # reading does not wait
        order.append("first")
    thread.join(DEADLINE)
    assert order == ["first", "second"]
    assert put_other == [(0,)]
    other.close()


def test_a_transaction_that_waits_too_long_is_an_error_that_names_the_database(
    database: EnhancedDatabaseConnection, url: str
) -> None:
    impatient = EnhancedDatabaseConnection(url, busy_timeout=0.2)
    with database.transaction():
        with pytest.raises(DatabaseError, match=r"(?i)lock") as caught:
            with impatient.transaction():
                pytest.fail("the block must not run")
    assert impatient.place in str(caught.value)
    put(impatient, "later")
    assert names_in(database) == ["later"]
    impatient.close()


def test_an_sql_error_is_a_database_error_that_names_the_database(database: EnhancedDatabaseConnection) -> None:
    with pytest.raises(DatabaseError, match="nothing was stored") as caught:
        database.query("SELECT * FROM nowhere")
    assert database.place in str(caught.value)
    with pytest.raises(DatabaseError, match="nothing was stored"):
        with database.transaction() as connection:
            connection.execute("INSERT INTO nowhere (id) VALUES (:id)", {"id": "secret"})
    assert "secret" not in str(caught.value)
    put(database, "a")
    assert names_in(database) == ["a"]


def test_a_row_that_refers_to_nothing_is_refused(database: EnhancedDatabaseConnection) -> None:
    with pytest.raises(DatabaseError, match=r"(?i)foreign key"):
        with database.transaction() as connection:
            connection.execute(
                "INSERT INTO tags (experiment_id, tag, position) VALUES (:id, :tag, 0)", {"id": "none", "tag": "a"}
            )


@pytest.mark.parametrize(
    "statement", ["DELETE FROM experiments", "UPDATE experiments SET name = 'b'", "DROP TABLE experiments"]
)
def test_a_query_cannot_write(database: EnhancedDatabaseConnection, statement: str) -> None:
    put(database, "a")
    with pytest.raises(DatabaseError, match=r"(?i)read.?only"):
        database.query(statement)
    assert names_in(database) == ["a"]


# --- the pool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_twenty_threads_share_the_pool(url: str, size: int) -> None:
    database = EnhancedDatabaseConnection(url, pool_size=size)
    put(database, "a")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                put(database, f"{number}-{i}")
                assert database.experiments.get(f"{number}-{i}") is not None
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert errors == []
    assert len(names_in(database)) == 101
    database.close()


def test_a_forked_child_uses_the_database_and_the_parent_goes_on(database: EnhancedDatabaseConnection) -> None:
    put(database, "before")
    child = os.fork()
    if not child:
        status = 1
        try:
            put(database, "child")
            database.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    put(database, "parent")
    assert names_in(database) == ["before", "child", "parent"]


def test_of_threads_that_claim_a_value_at_once_one_sets_it(database: EnhancedDatabaseConnection) -> None:
    put(database, "run")
    start, won = threading.Barrier(8), []

    def claim() -> None:
        start.wait()
        won.append(database.experiments.claim("run", "ended", {"try": 1}))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]
    found = database.experiments.get("run")
    assert found is not None
    assert found.metadata == {"ended": {"try": 1}}


def test_close_twice_does_nothing_and_within_a_transaction_is_refused(database: EnhancedDatabaseConnection) -> None:
    with database.transaction():
        with pytest.raises(DatabaseError, match="inside a transaction"):
            database.close()
    database.close()
    database.close()
    with pytest.raises(DatabaseError, match="closed"):
        names_in(database)
    with pytest.raises(DatabaseError, match="closed"):
        put(database, "late")


def test_a_block_that_ends_well_although_a_statement_failed_is_stored_or_says_that_it_is_not(url: str) -> None:
    database = EnhancedDatabaseConnection(url)
    told = ""
    try:
        with database.transaction(durable=True):
            put(database, "a")
            with pytest.raises(Exception, match="nowhere"):
                database.query("SELECT nonsense FROM nowhere")
    except DatabaseError as error:
        told = str(error)
    assert names_in(database) == ([] if "nothing was stored" in told else ["a"])
    assert ("nothing was stored" in told) == url.startswith("postgresql")
    put(database, "b")
    assert "b" in names_in(database)
    database.close()


# --- migrations -------------------------------------------------------------------------------------------------

OPEN = """
import sys
from model_checkpoint.database import EnhancedDatabaseConnection
database = EnhancedDatabaseConnection(sys.argv[1])
print(database.query("SELECT number FROM migrations ORDER BY number"))
database.close()
"""


def test_eight_processes_open_a_new_database_at_once(url: str) -> None:
    applied = str([(number,) for number in range(1, schema.latest_version() + 1)])
    assert {output.strip() for output in in_processes(OPEN, url)} == {applied}


def test_a_database_of_a_newer_version_is_refused_by_name_and_unchanged(url: str) -> None:
    database = EnhancedDatabaseConnection(url)
    with database.transaction() as connection:
        connection.execute("INSERT INTO migrations (number, name, applied_at) VALUES (99, 'from_the_future', 0.0)")
    database.close()
    with pytest.raises(FormatVersionError, match="99") as caught:
        EnhancedDatabaseConnection(url)
    assert database.place in str(caught.value)


def test_a_migration_that_fails_is_not_recorded_and_the_next_opening_does_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    EnhancedDatabaseConnection(url).close()
    broken = [True]

    def add_colour(connection: schema.Executes, types: dict[str, str]) -> None:
        connection.execute("ALTER TABLE experiments ADD COLUMN colour {text}".format_map(types))
        connection.execute("CREATE INDEX experiments_by_end ON experiments (ended_at)")
        if broken.pop():
            raise RuntimeError("the power is gone")
        connection.execute("UPDATE experiments SET colour = 'red'")

    monkeypatch.setattr(schema, "_MIGRATIONS", [*schema._MIGRATIONS, add_colour])
    with pytest.raises(RuntimeError, match="power"):
        EnhancedDatabaseConnection(url)
    broken.append(False)
    database = EnhancedDatabaseConnection(url)
    assert database.query("SELECT name FROM migrations ORDER BY number DESC")[0] == ("add_colour",)
    put(database, "a")
    assert database.query("SELECT id, colour FROM experiments") == [("a", None)]
    database.close()


# --- what is stored ---------------------------------------------------------------------------------------------


def test_an_experiment_comes_back_as_it_was_given(url: str) -> None:
    config = {"lr": 1e-3, "layers": [64, 64], "net": {"act": "gelu", "deep": True, "nothing": None}, "big": 2**62}
    config |= {
        "bounds": [math.inf, -math.inf],
        "text": "☃ 𝄞 'quoted' \"twice\" \\ %s :bind {brace}\n",
        "long": "x" * 200_000,
    }
    with ExperimentTracker(
        "naïve ☃", "p'%", tags=["a", "A", "a ", "é", 5], config=config, metadata={"m": {"k": []}}, database_url=url
    ) as tracker:
        tracker.log_hyperparameters({"lr": 1e-4})
        tracker.add_tags(["b", "a"])
    again = ExperimentTracker.resume(tracker.experiment_id, url)
    record = again.record
    assert (record.name, record.project, record.metadata) == ("naïve ☃", "p'%", {"m": {"k": []}})
    assert record.config == {**config, "lr": 1e-4}
    assert record.tags == ("a", "A", "a ", "é", 5, "b")
    assert record.status == "running"
    again.close("failed")


def test_values_of_metrics_survive_to_the_bit(url: str) -> None:
    values = [0.1, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 1 / 3, 0.0]
    steps = [None, 0, -1, 2**63 - 1, -(2**63), 5, 4, 4, None]
    with ExperimentTracker("run", database_url=url) as tracker:
        for value, step in zip(values, steps):
            tracker.log_metric("loss", value, step)
            tracker.log_metric("loss ", 1.0, step)  # names that differ in case or in spaces are different names
            tracker.log_metric("Loss", 2.0, step)
        points = tracker.get_metrics("loss")
        everything = tracker.get_metrics()
    assert [point["metric_value"].hex() for point in points] == [value.hex() for value in values]
    assert [point["step"] for point in points] == steps
    assert [point["metric_name"] for point in everything] == ["loss", "loss ", "Loss"] * len(values)


LOG = """
import sys
from model_checkpoint import ExperimentTracker
tracker = ExperimentTracker.resume(sys.argv[2], sys.argv[1])
for i in range(2000):
    tracker.log_metrics({"shared": float(i), "own-" + sys.argv[3]: float(i)}, step=i)
    if i % 500 == 0:
        tracker.flush()
tracker.close()
"""


@pytest.mark.slow
def test_eight_processes_log_into_one_experiment_in_order_and_lose_nothing(url: str) -> None:
    tracker = ExperimentTracker("shared", database_url=url)
    in_processes(LOG, url, tracker.experiment_id)
    assert len(tracker.get_metrics("shared")) == 8 * 2000
    for number in range(8):
        own = tracker.get_metrics(f"own-{number}")
        assert [point["metric_value"] for point in own] == [float(i) for i in range(2000)]
    assert tracker.database.experiments.position(tracker.experiment_id) == 8 * 2000 * 2
    tracker.close()


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_checkpoints_are_saved_found_flagged_deleted_restored_and_recovered(url: str, tmp_path: Path) -> None:
    with ExperimentTracker("run", database_url=url) as tracker:
        with EnhancedCheckpointManager(tracker, tmp_path / "saved", max_checkpoints=2) as manager:
            losses = [0.9, 0.3, 0.5, 0.4]
            ids = [manager.save_checkpoint({"weight": [float(i)]}, loss=losses[i], epoch=i) for i in range(4)]
            listed = [found["checkpoint_id"] for found in manager.list_checkpoints()]
            assert listed[-1] == ids[3]
            assert ids[1] in listed  # the best one is protected
            assert ids[0] not in listed
            best = manager.load_checkpoint(checkpoint_type="best_loss")
            assert best["_checkpoint_metadata"]["checkpoint_id"] == ids[1]
            manager.pin(ids[3])
            assert manager.delete_checkpoint(ids[1])
            assert manager.load_checkpoint(checkpoint_type="best_loss")["loss"] == 0.4
            manager.undelete(ids[1])
            assert manager.load_checkpoint(checkpoint_type="best_loss")["loss"] == 0.3
            assert not manager.recover()
            manager.rebuild_index()
            assert manager.verify_experiment_integrity()["failed"] == 0
            kept = [found["checkpoint_id"] for found in manager.list_checkpoints()]
        assert set(ids[1:2] + ids[3:]) <= set(kept)


SAVE = """
import json, sys
from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
manager = EnhancedCheckpointManager(checkpoint_dir=sys.argv[3], database_url=sys.argv[1], max_checkpoints=1000)
ids = []
for i in range(6):
    loss = 10.0 - i - int(sys.argv[4]) / 100
    ids.append(manager.save_checkpoint({"weight": [loss]}, loss=loss, experiment_id=sys.argv[2], epoch=i))
print(json.dumps(ids))
manager.close()
"""


@pytest.mark.slow
def test_eight_processes_save_into_one_experiment_and_one_flag_has_one_holder(url: str, tmp_path: Path) -> None:
    tracker = ExperimentTracker("shared", database_url=url)
    outputs = in_processes(SAVE, url, tracker.experiment_id, str(tmp_path / "saved"))
    acknowledged = {checkpoint_id for output in outputs for checkpoint_id in json.loads(output)}
    with EnhancedCheckpointManager(tracker, tmp_path / "saved", max_checkpoints=1000) as manager:
        listed = manager.list_checkpoints()
        assert {found["checkpoint_id"] for found in listed} == acknowledged
        sequences = [s for (s,) in tracker.database.query("SELECT sequence FROM checkpoints")]
        assert len(set(sequences)) == len(sequences) == 48
        assert manager.load_checkpoint(checkpoint_type="best_loss")["loss"] == 5.0 - 0.07
        assert [found["is_best_loss"] for found in listed].count(True) == 1
    tracker.close()


# --- servers only -----------------------------------------------------------------------------------------------


def test_a_password_is_nowhere_to_be_seen(server_url: str, caplog: pytest.LogCaptureFixture) -> None:
    scheme, _, rest = server_url.partition("://")
    account, _, place = rest.partition("@")
    url = f"{scheme}://nobody-{account.partition(':')[0]}:hunter2@{place}"
    with pytest.raises(DatabaseError) as caught:
        EnhancedDatabaseConnection(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "hunter2" not in caplog.text
    good = f"{scheme}://{account.partition(':')[0]}:{account.partition(':')[2] or 'hunter2'}@{place}"
    if scheme == "postgresql":  # trusted whatever the password is
        database = EnhancedDatabaseConnection(good)
        assert "hunter2" not in repr(database)
        assert "***" in repr(database)
        database.close()


def test_a_password_behind_the_question_mark_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    with new_database("postgresql", tmp_path) as url:
        database = EnhancedDatabaseConnection(f"{url}&password=hunter2&passfile=/hunter3&sslpassword=hunter4")
        shown = repr(database)
        database.close()
        with pytest.raises(DatabaseError) as caught:
            EnhancedDatabaseConnection(f"{url}&password=hunter2&options=-c%20nothing.hunter2%20-c%20hunter2")
    assert "search_path" in shown
    assert "hunter" not in shown + str(caught.value).partition(": ")[2]
    with pytest.raises(ConfigurationError, match="names no database") as refused:
        EnhancedDatabaseConnection("postgresql://user:hunter2@host?password=hunter2")
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize("rest", ["", "host", "user:hunter2@host", "user:hunter2@host:port/name"])
@pytest.mark.parametrize("scheme", SERVERS)
def test_a_url_that_cannot_be_used_says_what_to_use_and_shows_no_password(scheme: str, rest: str) -> None:
    with pytest.raises(ConfigurationError, match="database_url") as caught:
        EnhancedDatabaseConnection(f"{scheme}://{rest}")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    for scheme in SERVERS:
        with pytest.raises(DatabaseError, match=rf"{scheme}://user:\*\*\*@127.0.0.1:9/name"):
            EnhancedDatabaseConnection(f"{scheme}://user:hunter2@127.0.0.1:9/name")


def test_a_connection_that_the_server_has_cut_while_it_rested_is_replaced(server_url: str) -> None:
    database = EnhancedDatabaseConnection(server_url)
    put(database, "a")
    cut_connections(server_url)
    assert names_in(database) == ["a"]
    cut_connections(server_url)
    put(database, "b")
    assert names_in(database) == ["a", "b"]
    database.close()


def test_a_connection_that_is_cut_within_a_transaction_is_an_error_and_stores_nothing(server_url: str) -> None:
    database = EnhancedDatabaseConnection(server_url)

    def work() -> None:
        with database.transaction(durable=True):
            put(database, "a")
            cut_connections(server_url)
            put(database, "b")

    with pytest.raises(DatabaseError, match="nothing was stored"):
        work()
    assert names_in(database) == []
    put(database, "c")
    assert names_in(database) == ["c"]
    database.close()


def test_where_the_answer_to_a_commit_is_lost_nobody_says_that_nothing_was_stored(server_url: str) -> None:
    proxy = Proxy(server_url)
    database = EnhancedDatabaseConnection(proxy.url)
    proxy.cut_at = re.compile(rb"COMMIT(?!TED)")
    with pytest.raises(DatabaseError, match="whether it was stored is unknown") as caught:
        put(database, "a")
    assert "nothing was stored" not in str(caught.value)
    assert proxy.cuts == 1
    put(database, "b")  # the pool goes on
    assert set(names_in(database)) - {"a"} == {"b"}
    database.close()
    proxy.close()


def test_long_statements_are_not_kept_in_memory(server_url: str) -> None:
    database = EnhancedDatabaseConnection(server_url)

    def ask(count: int) -> None:
        binds = {f"i{place}": str(place) for place in range(count)}
        names = ", ".join(f":{name}" for name in binds)
        assert database.query(f"SELECT name FROM experiments WHERE id IN ({names})", binds) == []

    ask(3_000)
    tracemalloc.start()
    for count in range(3_000, 3_010):
        ask(count)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 2 << 20
    database.close()


def test_texts_are_compared_byte_by_byte_whatever_the_collation_of_a_postgresql_database_is(tmp_path: Path) -> None:
    with new_database("postgresql", tmp_path) as server:
        name = f"mc_{uuid.uuid4().hex[:16]}"
        try:
            run(server, f"CREATE DATABASE {name} TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")
        except sqlalchemy.exc.SQLAlchemyError as error:
            pytest.skip(f"this server makes no ICU database: {error}")
        try:
            url = sqlalchemy.make_url(server).set(database=name).difference_update_query(["options"])
            database = EnhancedDatabaseConnection(url.render_as_string(hide_password=False))
            collations = database.query(
                "SELECT DISTINCT COALESCE(collation_name, 'the default') FROM information_schema.columns "
                "WHERE table_schema = current_schema() AND data_type = 'text'"
            )
            put(database, "a", "B", "b", "Z", "größe")
            with Queries(database) as queries:
                orders = [record.name for record in queries.search_experiments(order_by="name")]
                below = {record.name for record in queries.search_experiments("name < 'a'")}
                letters = {record.name for record in queries.search_experiments(r"name.matches('^gr\\w\\we$')")}
            database.close()
        finally:
            run(server, f"DROP DATABASE {name} WITH (FORCE)")
    assert collations == [("C",)]
    assert orders == ["B", "Z", "a", "b", "größe"]
    assert below == {"B", "Z"}
    assert letters == {"größe"}


def test_a_silent_postgresql_server_is_noticed_as_the_url_or_else_the_timeout_says(tmp_path: Path) -> None:
    with new_database("postgresql", tmp_path) as url:
        told = []
        for query in ("", "&keepalives_idle=77"):
            database = EnhancedDatabaseConnection(url + query, busy_timeout=60)
            with database.transaction() as connection:
                told.append(connection.raw.connection.driver_connection.info.get_parameters())
            database.close()
    assert [each["keepalives_idle"] for each in told] == ["30", "77"]
    assert {each["tcp_user_timeout"] for each in told} == {"60000"}


def test_schemas_of_one_postgresql_database_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with new_database("postgresql", tmp_path) as first, new_database("postgresql", tmp_path) as second:
        one, other = (EnhancedDatabaseConnection(url, busy_timeout=5) for url in (first, second))
        with one.transaction():
            put(other, "a")
            with new_database("postgresql", tmp_path) as third:
                EnhancedDatabaseConnection(third, busy_timeout=5).close()
        assert names_in(other) == ["a"]
        one.close()
        other.close()
