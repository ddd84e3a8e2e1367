"""A database that is away: training goes on, and all that was logged is stored once, in order, when it is back."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import DatabaseError
from tests.servers import KINDS, Proxy, new_database

ROOT = Path(__file__).parents[2]
COMMIT = re.compile(rb"COMMIT(?!TED)")
DEADLINE = 60.0  # seconds that anything may take before it counts as hung


@pytest.fixture(params=KINDS[1:])
def proxy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with new_database(request.param, tmp_path) as url:
        proxy = Proxy(url)
        yield proxy
        proxy.close()


def spools(folder: Path) -> list[Path]:
    return sorted((folder / "state" / "model_checkpoint" / "spool").glob("*"))


def values(tracker: ExperimentTracker, name: str = "loss") -> list[float]:
    return [point["metric_value"] for point in tracker.get_metrics(name)]


def test_training_goes_on_while_the_server_is_away_and_nothing_is_lost_or_doubled(
    proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = ExperimentTracker("run", database_url=proxy.url)
    for i in range(300):
        if i == 100:
            proxy.take_down()
        if i == 200:
            assert len(spools(tmp_path)) == 1
            proxy.bring_up()
        tracker.log_metric("loss", float(i), step=i)
        tracker.log_metrics({"a": float(i), "b": float(-i)}, step=i)
        if i % 20 == 19:
            tracker.flush()
    assert values(tracker) == [float(i) for i in range(300)]
    assert [point["metric_name"] for point in tracker.get_metrics()] == ["loss", "a", "b"] * 300
    assert spools(tmp_path) == []
    told = [record.message for record in caplog.records if "until the database takes them" in record.message]
    assert len(told) == 1
    tracker.close()


def test_a_connection_that_breaks_at_a_commit_doubles_nothing(proxy: Proxy) -> None:
    tracker = ExperimentTracker("run", database_url=proxy.url)
    for i in range(30):
        tracker.log_metric("loss", float(i), step=i)
        if i % 3 == 0:
            proxy.cut_at = COMMIT
        tracker.flush()
    assert proxy.cuts == 10
    assert values(tracker) == [float(i) for i in range(30)]
    assert tracker.database.metrics.summaries(tracker.experiment_id)["loss"].points == 30
    tracker.close()


def test_a_save_whose_commit_has_no_answer_is_whole_or_not_there_and_the_next_ones_are_sound(
    proxy: Proxy, tmp_path: Path
) -> None:
    tracker = ExperimentTracker("run", database_url=proxy.url)
    acknowledged, refused = {}, 0
    with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None) as manager:
        for step in range(24):
            if step % 2:
                after = step // 2 % 3  # commits of this save that have an answer
                proxy.cut_at, proxy.cut_after = COMMIT, after
            try:
                acknowledged[manager.save_checkpoint({"w": [float(step)]}, step=step)] = step
            except DatabaseError:
                refused += 1
            proxy.cut_at = None
        assert proxy.cuts >= 8
        assert refused
    with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None) as manager:
        rows = {row["checkpoint_id"]: row for row in manager.list_checkpoints()}
        assert acknowledged.keys() <= rows.keys()
        assert {row["status"] for row in rows.values()} == {"committed"}
        assert len({row["step"] for row in rows.values()}) == len(rows)
        for checkpoint_id, row in rows.items():
            assert manager.load_checkpoint(checkpoint_id)["model_state_dict"] == {"w": [float(row["step"])]}
        assert {path.name for path in (tmp_path / "c" / tracker.experiment_id).iterdir()} == rows.keys()
        assert list((tmp_path / "c" / ".engine" / "staging").iterdir()) == []
    tracker.close()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_whose_metrics_were_spooled_notes_them_where_it_stands(
    proxy: Proxy, tmp_path: Path, blocking: bool
) -> None:
    run = ExperimentTracker("run", database_url=proxy.url)
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager:
        run.log_arrays("loss", range(10), range(10))
        proxy.cut_at = COMMIT
        saved = manager.save_checkpoint({"w": [1.0]}, blocking=blocking)
        assert proxy.cuts == 1
    run.log_arrays("loss", range(10, 15), range(10, 15))
    run.close()
    with ExperimentTracker.resume(run.experiment_id, proxy.url, at_checkpoint=saved) as run:
        assert values(run) == [float(i) for i in range(10)]


def test_a_block_that_ends_while_the_server_is_away_ends_well(
    proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExperimentTracker("run", database_url=proxy.url) as run:
        run.log_metric("loss", 0.5)
        proxy.take_down()
    assert "ended as completed" in caplog.text
    proxy.bring_up()
    with ExperimentTracker.resume(run.experiment_id, proxy.url) as run:
        assert values(run) == [0.5]


def test_who_has_no_folder_of_his_own_spools_elsewhere(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExperimentTracker("run", database_url=proxy.url) as run:
        proxy.take_down()
        run.log_metric("loss", 0.5)
        run.flush()
        assert len(list(tmp_path.glob("state-*/model_checkpoint/spool/*"))) == 1
        proxy.bring_up()
        assert values(run) == [0.5]


LOG_AND_WAIT = """
import os, sys
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import DatabaseError
tracker = ExperimentTracker.resume(sys.argv[2], sys.argv[1])
with tracker.database.transaction() as connection:
    connection.execute("PRAGMA busy_timeout=20")
print("ready", flush=True)
sys.stdin.readline()
for i in range(100):
    tracker.log_metric("loss", float(i), step=i)
    if i % 10 == 9:
        tracker.flush()
print("logged", flush=True)
sys.stdin.readline()
"""


def killed_during_an_outage(url: str, path: Path, experiment_id: str) -> list[Path]:
    """Let a process log while the database is locked, and kill it; returns what it left behind."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOG_AND_WAIT, url, experiment_id],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stdout.readline() == "logged\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(DEADLINE)
    blocker.execute("ROLLBACK")
    blocker.close()
    return list(Path(f"{path}-spool").iterdir())


def test_what_a_killed_process_left_behind_is_stored_by_the_next_tracker(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    url = f"sqlite:///{path}"
    with ExperimentTracker("run", database_url=url) as first:
        pass
    (left,) = killed_during_an_outage(url, path, first.experiment_id)
    content = left.read_bytes()
    with ExperimentTracker("another run", database_url=url):
        assert not left.exists()
    again = ExperimentTracker.resume(first.experiment_id, url)
    assert values(again) == [float(i) for i in range(100)]
    again.close()
    # A crash after the rows were stored, and before the file was removed, finds it there once more.
    left.write_bytes(content)
    again = ExperimentTracker.resume(first.experiment_id, url)
    assert not left.exists()
    assert values(again) == [float(i) for i in range(100)]
    again.close()


WAITS = """
import sys
from model_checkpoint import ExperimentTracker
run = ExperimentTracker.resume(sys.argv[2], sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
run.log_metric("loss", 1.0)
run.log_arrays("loss", [2.0, 3.0])
sys.stdin.readline()
run.log_metric("loss", 4.0)
run.log_arrays("loss", [5.0] * 10)
run.log_metric("loss", 6.0)
sys.stdin.readline()
run.close()
print("closed", flush=True)
"""


def appears(folder: Path, beyond: int = 0) -> Path:
    """Return the file that another process makes there, as soon as it has more bytes than these."""
    deadline = time.monotonic() + DEADLINE
    while True:
        for file in folder.glob("*"):
            if file.stat().st_size > beyond:
                return file
        assert time.monotonic() < deadline, f"nothing came to {folder}"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed", [True, False])
def test_metrics_that_wait_for_a_lock_are_in_the_spool_meanwhile(
    tmp_path: Path, kind: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with new_database(kind, tmp_path) as url:
        run = ExperimentTracker("run", database_url=url)
        run.close()
        folder = Path(f"{run.database.place}-spool") if kind == "sqlite" else tmp_path / "state/model_checkpoint/spool"
        blocker = EnhancedDatabaseConnection(url)
        command = [sys.executable, "-c", WAITS, url, run.experiment_id]
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        with child:
            assert child.stdout.readline() == "ready\n"
            with blocker.transaction() as connection:
                connection.execute("UPDATE experiments SET points = points WHERE id = :id", {"id": run.experiment_id})
                child.stdin.write("go\n")
                child.stdin.flush()
                spool = appears(folder)
                child.stdin.write("log more\n")
                child.stdin.flush()
                appears(folder, beyond=spool.stat().st_size)
                if killed:
                    child.kill()
                else:
                    child.stdin.write("close\n")
                    child.stdin.flush()
            assert child.stdout.readline() == ("" if killed else "closed\n")
        blocker.close()
        assert spool.exists() == killed
        with ExperimentTracker.resume(run.experiment_id, url) as again:
            assert values(again) == [1.0, 2.0, 3.0, 4.0, *[5.0] * 10, 6.0]
        assert list(folder.iterdir()) == []


def test_a_spool_that_cannot_be_removed_does_not_keep_metrics_from_being_stored(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"cannot remove {path}")

    with ExperimentTracker("run", database_url=proxy.url) as run:
        run.log_metric("loss", 1.0)
        proxy.take_down()
        run.flush()
        proxy.bring_up()
        monkeypatch.setattr(Path, "unlink", refuse)
        for value in (2.0, 3.0):
            run.log_metric("loss", value)
            run.flush()
        assert "which cannot be removed" in caplog.text
        monkeypatch.undo()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert values(run) == [1.0, 2.0, 3.0]
    assert spools(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_record_that_was_cut_off_is_left_out_and_those_before_it_are_stored(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs.db"
    url = f"sqlite:///{path}"
    with ExperimentTracker("run", database_url=url) as first:
        pass
    (left,) = killed_during_an_outage(url, path, first.experiment_id)
    os.truncate(left, left.stat().st_size - cut)
    again = ExperimentTracker.resume(first.experiment_id, url)
    assert values(again) == [float(i) for i in range(90)]
    again.close()


def test_a_spool_whose_writer_lives_is_left_to_it(proxy: Proxy, tmp_path: Path) -> None:
    tracker = ExperimentTracker("run", database_url=proxy.url)
    proxy.take_down()
    tracker.log_metric("loss", 1.0)
    tracker.flush()
    proxy.bring_up()
    with ExperimentTracker("another run", database_url=proxy.url):
        assert len(spools(tmp_path)) == 1
    tracker.flush()
    assert spools(tmp_path) == []
    assert values(tracker) == [1.0]
    tracker.close()


def test_a_file_that_is_no_spool_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with ExperimentTracker("run", database_url=f"sqlite:///{path}"):
        pass
    folder = Path(f"{path}-spool")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "target").write_text("mine too")
    with ExperimentTracker("run", database_url=f"sqlite:///{path}"):
        pass
    assert sorted(each.read_text() for each in folder.iterdir()) == ["mine", "mine too"]
