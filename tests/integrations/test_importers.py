"""Importers, on files that the real tools wrote (see make_samples.py) and on damaged copies of them."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Columns, Point
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.integrations import import_mlflow, import_tensorboard, import_trackio, importing
from model_checkpoint.integrations import mlflow_importer as mlflow
from tests.servers import KINDS, new_database

SAMPLES = Path(__file__).parent / "samples"
EVENTS = "events.out.tfevents.1700000000.host.1.0"
IMPORTERS: dict[str, tuple[Callable[..., list[str]], str, int]] = {
    "mlflow database": (import_mlflow, "mlflow.db", 3),
    "mlflow folder": (import_mlflow, "mlruns", 3),
    "tensorboardx": (import_tensorboard, "tensorboardx", 2),
    "torch": (import_tensorboard, "torch", 1),
    "trackio": (import_trackio, "trackio/digits.db", 2),
}


@pytest.fixture(params=KINDS)
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, of every kind."""
    with new_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path}/imported.db"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A copy of the samples, which a test may damage."""
    return Path(shutil.copytree(SAMPLES, tmp_path / "samples"))


def stored(url: str) -> dict[str, tuple[ExperimentRecord, list[Point]]]:
    """Return name -> experiment and its points, of everything in a database."""
    with closing(EnhancedDatabaseConnection(url)) as database:
        found = [database.experiments.get(row[0]) for row in database.query("SELECT id FROM experiments")]
        return {run.name: (run, database.metrics.points(run.id)) for run in found if run is not None}


def series(points: list[Point], name: str) -> list[tuple[str, int | None, float]]:
    """Return (value as text, which NaN equals itself in, step, time) of one metric."""
    return [(repr(value), step, at) for each, value, step, at in points if each == name]


def contents(path: Path) -> dict[str, bytes]:
    """Return every file of a folder with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("source", ["mlflow.db", "mlruns"])
def test_mlflow_runs_come_with_everything(source: str, url: str) -> None:
    ids = import_mlflow(SAMPLES / source, url)
    runs = stored(url)
    outer, points = runs["sweep: 'all' of \"it\" é"]
    inner, inner_points = runs["inner"]
    assert set(runs) == {outer.name, "inner", "killed"}, "the deleted one stays away"
    assert set(ids) == {run.id for run, _ in runs.values()}
    assert {run.project for run, _ in runs.values()} == {"digits"}
    assert [outer.status, inner.status, runs["killed"][0].status] == ["completed", "failed", "interrupted"]
    assert (outer.parent_id, inner.parent_id) == (None, outer.id)
    numbers = {"lr": 0.1, "layers": 3, "eps": 1e-08}
    texts = {"optimizer": "sgd", "dropout": "NaN", "amp": "True", "data/name": "first\nsecond"}
    assert outer.config == {**numbers, **texts}
    assert outer.metadata["mlflow_tags"]["team"] == "vision"
    assert outer.metadata["mlflow_tags"]["mlflow.source.name"] == "train.py"
    imported = outer.metadata["imported"]
    assert (imported["tool"], imported["source"]) == ("mlflow", str(SAMPLES / source))
    assert len(imported["id"]) == 32
    assert 1.7e9 < outer.created_at <= inner.created_at <= (inner.ended_at or 0) <= (outer.ended_at or 0) < 4e9
    start = 1_700_000_000.0
    losses = ["1.5", "0.75", "nan", "inf", "-inf"]
    assert series(points, "val/loss") == [(value, step, start + step) for step, value in enumerate(losses)]
    sevenths = [(repr(step / 7), 10 * step, start + step) for step in range(5)]
    assert series(points, "acc") == [("0.5", -3, start - 0.001), *sevenths]
    assert len(points) == 11
    assert [point[:3] for point in inner_points] == [("loss", 0.25, 0)]


def test_points_are_in_order_of_time_then_step_across_metrics(url: str) -> None:
    import_mlflow(SAMPLES / "mlflow.db", url)
    (points,) = (points for _, points in stored(url).values() if len(points) > 1)
    keys = [(at, step) for _, _, step, at in points]
    assert keys == sorted(keys)
    assert [name for name, *_ in points[:3]] in (["acc", "acc", "val/loss"], ["acc", "val/loss", "acc"])


def test_tensorboard_folders_are_runs(url: str) -> None:
    names: list[str] = []
    ids = import_tensorboard(SAMPLES / "tensorboardx", url, on_run=names.append)
    runs = stored(url)
    assert names == ["train", "val"]
    assert ids == [runs[name][0].id for name in names]
    values = ["1.5", repr(struct.unpack("<f", struct.pack("<f", 0.1))[0]), "nan", "inf", "-inf"]
    for name in names:
        run, points = runs[name]
        assert run.project == "tensorboardx"
        assert run.status == "completed"
        assert run.metadata["imported"]["id"] == f"{name}/{EVENTS}"
        assert len(points) == 5, "texts and histograms are no scalars"
        assert series(points, f"loss/{name}") == [(v, step, 1_700_000_000.25 + step) for step, v in enumerate(values)]


def test_torch_writes_scalars_in_three_forms(url: str) -> None:
    import_tensorboard(SAMPLES / "torch", url)
    ((run, points),) = stored(url).values()
    single = repr(struct.unpack("<f", struct.pack("<f", 0.1))[0])
    expected = [("1.5", 0, 1_700_000_000.5), (single, 1, 1_700_000_001.5), ("nan", 2, 1_700_000_002.5)]
    assert run.name == "torch"
    assert series(points, "plain") == expected
    assert series(points, "tensor") == expected
    assert series(points, "double") == [(v, step, 1_700_000_009.0) for step, v in enumerate(["1.5", "0.1", "nan"])]
    assert series(points, "large step") == [("1.0", 2**40, 1_700_000_010.0)]
    assert len(points) == 10


def test_trackio_projects(url: str, caplog: pytest.LogCaptureFixture) -> None:
    import_trackio(SAMPLES / "trackio" / "digits.db", url)
    runs = stored(url)
    one, points = runs["one"]
    assert {run.project for run, _ in runs.values()} == {"digits"}
    assert (one.config["lr"], one.config["limit"], one.config["opt"]) == (0.1, math.inf, {"name": "sgd"})
    assert one.config["betas"][0] == 0.9
    assert math.isnan(one.config["betas"][1])
    assert len(one.config) == 4
    assert one.metadata["trackio"]["_Username"] == "somebody"
    found = [series(points, name) for name in ("loss", "acc")]
    assert [(value, step) for value, step, _ in found[0]] == [("1.5", 0), ("nan", 7), ("inf", 8), ("-inf", 9)]
    assert [(value, step) for value, step, _ in found[1]] == [("0.0", 0), ("1.0", 7)]
    assert abs(found[0][0][2] - one.created_at) < 1
    assert [point[:3] for point in runs["two"][1]] == [("loss", 0.25, 3)]
    assert "1 of note" in caplog.text


@pytest.fixture
def in_india(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is five and a half hours before UTC."""
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_india")
def test_a_trackio_file_of_before_runs_had_ids(tmp_path: Path, url: str) -> None:
    with closing(sqlite3.connect(tmp_path / "old.db")) as db, db:
        db.execute("CREATE TABLE metrics (id INTEGER, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)")
        db.execute("CREATE TABLE configs (id INTEGER, run_name TEXT, config TEXT, created_at TEXT)")
        db.execute("INSERT INTO metrics VALUES (1, '2023-11-15T03:43:20', 'one', 4, '{\"loss\": NaN}')")
    import_trackio(tmp_path / "old.db", url)
    run, points = stored(url)["one"]
    assert run.metadata["imported"]["id"].startswith("old/one/")
    assert series(points, "loss") == [("nan", 4, 1_700_000_000.0)]
    assert (run.created_at, run.ended_at) == (1_700_000_000.0, 1_700_000_000.0)


@pytest.mark.parametrize("columns", ["", ", run_id TEXT"])
def test_trackio_runs_without_ids_in_files_of_one_name_are_told_apart(columns: str, tmp_path: Path, url: str) -> None:
    ids = []
    for folder, loss in (("alice", 1.0), ("bob", 2.0)):
        (tmp_path / folder).mkdir()
        with closing(sqlite3.connect(tmp_path / folder / "vision.db")) as db, db:
            db.execute(f"CREATE TABLE metrics (id, timestamp, run_name, step, metrics{columns})")
            db.execute(f"CREATE TABLE configs (id, run_name, config, created_at{columns})")
            sql = "INSERT INTO metrics (timestamp, run_name, metrics) VALUES ('2024-01-01T00:00:00', 'baseline', ?)"
            db.execute(sql, (f'{{"loss": {loss}}}',))
        ids += [import_trackio(tmp_path / folder / "vision.db", url) for _ in range(2)]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    with closing(EnhancedDatabaseConnection(url)) as database:
        losses = [[point[1] for point in database.metrics.points(run)] for (run,) in ids]
    assert losses == [[1.0], [1.0], [2.0], [2.0]]


def test_a_trackio_value_too_large_for_a_float_is_infinite(samples: Path, url: str) -> None:
    path = samples / "trackio" / "digits.db"
    with closing(sqlite3.connect(path)) as db, db:
        content = f'{{"loss": 1{"0" * 400}, "low": -1{"0" * 5000}}}'
        db.execute("UPDATE metrics SET metrics = ? WHERE run_name = 'two'", (content,))
    assert len(import_trackio(path, url)) == 2
    assert [point[:2] for point in stored(url)["two"][1]] == [("loss", math.inf), ("low", -math.inf)]


@pytest.mark.parametrize("name", IMPORTERS)
def test_importing_twice_adds_nothing_and_changes_no_source(name: str, samples: Path, url: str) -> None:
    importer, source, count = IMPORTERS[name]
    before = contents(samples)
    ids = importer(samples / source, url)
    first = repr(stored(url))
    told: list[str] = []
    assert importer(samples / source, url, on_run=told.append) == ids
    assert len(set(ids)) == len(told) == count
    assert repr(stored(url)) == first
    assert contents(samples) == before, "nothing was changed, and nothing put beside it"


def test_a_source_that_nobody_may_write_is_read(samples: Path, url: str) -> None:
    files = [samples / "trackio" / "digits.db", samples / "trackio"]
    for file in files:
        file.chmod(0o555)
    try:
        assert len(import_trackio(files[0], url)) == 2
    finally:
        files[1].chmod(0o755)


def test_a_folder_that_takes_no_new_file_is_read(samples: Path, url: str) -> None:
    (samples / "trackio" / "digits.db-shm").mkdir()  # permissions do not stop root
    assert len(import_trackio(samples / "trackio" / "digits.db", url)) == 2


def test_a_writer_that_begins_meanwhile_changes_nothing_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "source.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE numbers (number INTEGER, filler TEXT)")
        writer.executemany("INSERT INTO numbers VALUES (?, ?)", [(number, "x" * 500) for number in range(2000)])
    assert {file.name for file in tmp_path.iterdir()} == {"source.db"}
    with closing(importing.SQLiteSource(path, "any", {"numbers": ["number"]}, "")) as source:
        rows = source.rows("SELECT number FROM numbers ORDER BY rowid")
        found = [next(rows)[0]]
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("UPDATE numbers SET number = -1")
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        found += [number for (number,) in rows]
    assert found == list(range(2000))
    assert {file.name for file in tmp_path.iterdir()} == {"source.db"}


def test_a_trackio_file_that_is_written_meanwhile_is_read_with_its_log(samples: Path, url: str) -> None:
    path = samples / "trackio" / "digits.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("UPDATE metrics SET step = 99 WHERE run_name = 'two'")
        writer.commit()
        assert os.stat(f"{path}-wal").st_size
        import_trackio(path, url)
    assert stored(url)["two"][1][0][2] == 99


def test_every_database_takes_a_run(any_url: str) -> None:
    ids = import_mlflow(SAMPLES / "mlflow.db", any_url)
    assert import_mlflow(SAMPLES / "mlflow.db", any_url) == ids
    runs = stored(any_url)
    outer, points = runs["sweep: 'all' of \"it\" é"]
    assert runs["inner"][0].parent_id == outer.id
    assert [value for value, *_ in series(points, "val/loss")] == ["1.5", "0.75", "nan", "inf", "-inf"]
    with ExperimentTracker.resume(outer.id, any_url) as tracker:
        tracker.log_metric("acc", 1.0, step=99)
    assert len(stored(any_url)[outer.name][1]) == 12


def test_points_go_in_by_batches_and_keep_their_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_AT_ONCE", 3)
    import_mlflow(SAMPLES / "mlflow.db", url)
    monkeypatch.undo()
    by_threes = stored(url)["sweep: 'all' of \"it\" é"][1]
    import_mlflow(SAMPLES / "mlflow.db", f"{url}.whole")
    assert repr(by_threes) == repr(stored(f"{url}.whole")["sweep: 'all' of \"it\" é"][1])


def test_a_failure_leaves_no_half_run(samples: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_AT_ONCE", 3)
    real, calls = importing.unpack, []

    def fail_at_the_third(batch: bytes) -> dict[str, Columns]:
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return real(batch)

    monkeypatch.setattr(importing, "unpack", fail_at_the_third)
    with pytest.raises(RuntimeError, match="no more"):
        import_mlflow(samples / "mlflow.db", url)
    assert not stored(url)
    monkeypatch.setattr(importing, "unpack", real)
    assert len(import_mlflow(samples / "mlflow.db", url)) == len(stored(url)) == 3


def test_nothing_is_grouped_while_others_cannot_write(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, waits = importing.grouped, []

    def group(batch: list[Point]) -> dict[str, Columns]:
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")  # raises where a transaction goes on
        waits.append(len(batch))
        return real(batch)

    monkeypatch.setattr(importing, "grouped", group)
    import_mlflow(SAMPLES / "mlflow.db", url)
    assert sum(waits) == 12


def test_a_callback_that_fails_stops_it_and_importing_again_goes_on(url: str) -> None:
    def refuse(name: str) -> None:
        raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt):
        import_mlflow(SAMPLES / "mlflow.db", url, on_run=refuse)
    assert len(stored(url)) == 1
    import_mlflow(SAMPLES / "mlflow.db", url)
    assert len(stored(url)) == 3


@pytest.mark.parametrize("source", ["mlflow.db", "mlruns"])
def test_a_run_that_has_not_ended_is_left_until_it_has(
    source: str, samples: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def end(old: str, new: str) -> None:
        with closing(sqlite3.connect(samples / "mlflow.db")) as db, db:
            db.execute("UPDATE runs SET status = ? WHERE status = ?", (new, old))
        for file in (samples / "mlruns").rglob("meta.yaml"):
            codes = {"RUNNING": "status: 1\n", "FINISHED": "status: 3\n"}
            file.write_text(file.read_text().replace(codes[old], codes[new]))

    end("FINISHED", "RUNNING")
    assert len(import_mlflow(samples / source, url)) == 2
    assert set(stored(url)) == {"inner", "killed"}
    assert caplog.text.count("is RUNNING and was not imported") == 1
    end("RUNNING", "FINISHED")
    import_mlflow(samples / source, url)
    assert len(stored(url)) == 3


def test_runs_under_one_another_in_a_circle_are_all_imported(samples: Path, url: str) -> None:
    with closing(sqlite3.connect(samples / "mlflow.db")) as db, db:
        ((outer,),) = db.execute("SELECT value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall()
        ((inner,),) = db.execute("SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId'").fetchall()
        db.execute("INSERT INTO tags (key, value, run_uuid) VALUES ('mlflow.parentRunId', ?, ?)", (inner, outer))
    assert len(import_mlflow(samples / "mlflow.db", url)) == len(stored(url)) == 3


@pytest.mark.parametrize("importer", [import_mlflow, import_tensorboard, import_trackio])
def test_what_is_no_source_is_refused_and_no_database_made(
    importer: Callable[..., list[str]], tmp_path: Path, url: str
) -> None:
    (tmp_path / "text").write_text("no database, but a file that is longer than a header of one" * 10)
    (tmp_path / "none").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with closing(sqlite3.connect(tmp_path / "other.db")) as db, db:
        db.execute("CREATE TABLE metrics (name TEXT)")
    for name in ("missing", "text", "none", "empty", "other.db"):
        with pytest.raises(ConfigurationError, match=name):
            importer(tmp_path / name, url)
    assert not (tmp_path / "imported.db").exists()


def test_a_missing_table_is_named(samples: Path, url: str) -> None:
    with closing(sqlite3.connect(samples / "mlflow.db")) as db, db:
        db.execute("DROP TABLE params")
    with pytest.raises(ConfigurationError, match=r"has no table params\. .*mlflow db upgrade"):
        import_mlflow(samples / "mlflow.db", url)
    with closing(sqlite3.connect(samples / "trackio" / "digits.db")) as db, db:
        db.execute("ALTER TABLE metrics RENAME COLUMN step TO at")
    with pytest.raises(ConfigurationError, match="no columns step in its table metrics"):
        import_trackio(samples / "trackio" / "digits.db", url)


def test_a_damaged_database_is_named(samples: Path, url: str) -> None:
    path = samples / "mlflow.db"
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises((ConfigurationError, FormatError), match=r"mlflow\.db"):
        import_mlflow(path, url)


@pytest.mark.parametrize(
    ("column", "value"), [("metrics", "{"), ("metrics", "[1]"), ("timestamp", "yesterday"), ("metrics", 7)]
)
def test_a_damaged_trackio_row_is_named(column: str, value: object, samples: Path, url: str) -> None:
    path = samples / "trackio" / "digits.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE metrics SET {column} = ? WHERE run_name = 'two'", (value,))
    with pytest.raises(FormatError, match=r"digits\.db"):
        import_trackio(path, url)
    assert set(stored(url)) == {"one"}


def test_a_damaged_line_of_an_mlruns_folder_is_named_and_an_unfinished_one_left_out(samples: Path, url: str) -> None:
    (file,) = (samples / "mlruns").rglob("metrics/acc")
    good = file.read_bytes()
    file.write_bytes(good.replace(b" 20\n", b" twenty\n"))
    with pytest.raises(FormatError, match="acc, line 3 is not 'timestamp value step'"):
        import_mlflow(samples / "mlruns", url)
    file.write_bytes(good[:-4])
    import_mlflow(samples / "mlruns", url)
    assert len(series(stored(url)["sweep: 'all' of \"it\" é"][1], "acc")) == good.count(b"\n") - 1


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("plain", "plain"),
        ("'it''s: #1'", "it's: #1"),
        ('"tab\\t\\xE9 \\u2603 \\U0001F600 \\\\ \\""', 'tab\té ☃ \U0001f600 \\ "'),
        ("folded\n  onto two", "folded onto two"),
        ("'a\n\n  b'", "a\nb"),
        ('"broken wi\\\n  thin\\\n  \\ it"', "broken within it"),
    ],
)
def test_names_in_yaml(written: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "meta.yaml").write_text(f"first: 1\nname: {written}\nlast: 2\n", encoding="utf-8")
    assert mlflow._meta(tmp_path / "meta.yaml") == {"first": "1", "name": meant, "last": "2"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0.001", 0.001),
        ("1e-3", "1e-3"),
        ("3.10", "3.10"),
        ("-2", -2),
        ("-0", "-0"),
        ("01", "01"),
        ("1e999", "1e999"),
        ("9" * 400, "9" * 400),
        ("true", "true"),
        ("", ""),
    ],
)
def test_parameters_written_as_python_writes_numbers_become_numbers(written: str, meant: object) -> None:
    assert repr(mlflow._number_or_text(written)) == repr(meant)


def test_a_damaged_event_file_ends_itself_only(samples: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = samples / "tensorboardx"
    shutil.copy(folder / "train" / EVENTS, folder / "train" / "events.out.tfevents.1700000001.host.1.1")
    path = folder / "train" / EVENTS
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        import_tensorboard(folder, url)
    assert caplog.text.count("fails its checksum") == 1
    assert str(path) in caplog.text
    counts = {name: len(points) for name, (_, points) in stored(url).items()}
    assert counts["val"] == 5
    assert 5 < counts["train"] < 10


def test_an_event_file_with_nothing_in_it_is_a_run_without_metrics(tmp_path: Path, url: str) -> None:
    (tmp_path / "logs" / "a").mkdir(parents=True)
    (tmp_path / "logs" / "a" / EVENTS).write_bytes(b"")
    import_tensorboard(tmp_path / "logs", url)
    run, points = stored(url)["a"]
    assert points == []
    assert run.created_at == run.ended_at == (tmp_path / "logs" / "a" / EVENTS).stat().st_mtime
