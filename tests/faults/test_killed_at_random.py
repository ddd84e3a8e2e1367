"""Row 1: kill -9 at random moments of background saves, garbage collection, recovery and migration.

``tests/test_crash.py`` does the same to blocking saves and deletions. The oracle lives outside the store: a child says
what it was told by the engine, as soon as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from common import DEADLINE, ROOT

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection, schema

CHILD = """
import sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection, schema

folder, experiment, mode, start = sys.argv[1:]
url = f"sqlite:///{folder}/e.db"

def tell(*words):
    print(*words, flush=True)

def widen(connection, types):
    "Rebuild the largest table with a column more, as migrations of SQLite do."
    connection.execute("CREATE TABLE wider AS SELECT *, 'new' AS added FROM checkpoints")
    connection.execute("DROP TABLE checkpoints")
    connection.execute("ALTER TABLE wider RENAME TO checkpoints")

if mode == "migration":
    schema.migration(widen)
    tell("go")
    EnhancedDatabaseConnection(url)
    tell("migrated")
elif mode == "recovery":
    tell("go")
    manager = EnhancedCheckpointManager(None, folder + "/c", database_url=url)
    tell("recovered")
    manager.rebuild_index()
    tell("rebuilt")
else:
    tracker = ExperimentTracker.resume(experiment, url)
    manager = EnhancedCheckpointManager(
        tracker, folder + "/c", async_save=True, max_pending_saves=2, max_checkpoints=3 if mode == "gc" else None
    )
    tell("go")
    epoch, mine = int(start), []
    while True:
        epoch += 1
        state = {"epoch": epoch, "weights": array("d", [epoch]) * 20_000}
        mine.append(manager.save_checkpoint(state, {"m": array("f", [epoch] * 99)}, epoch=epoch, loss=1 / epoch))
        state["weights"][0] = -1.0
        tell("called", mine[-1], epoch)
        if epoch % 3 == 0:
            manager.wait()
            for saved in mine:
                tell("durable", saved)
        if mode == "gc" and epoch % 2 == 0:
            manager.empty_trash()
"""


def run_and_kill(folder: Path, experiment: str, mode: str, start: int, wait: float) -> list[list[str]]:
    """Kill the child ``wait`` seconds after it says go; returns its words."""
    command = [sys.executable, "-c", CHILD, str(folder), experiment, mode, str(start)]
    # Unbuffered: what readline() had read ahead would come after the words that followed it.
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        deadline, said = time.monotonic() + wait, b""
        while (left := deadline - time.monotonic()) > 0:  # drains the pipe meanwhile, so that the child never blocks
            if select.select([child.stdout], [], [], left)[0]:
                part = os.read(child.stdout.fileno(), 1 << 16)
                if not part:
                    break
                said += part
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
        assert child.wait(DEADLINE) in (0, -signal.SIGKILL)
    return [line.split() for line in said[: said.rfind(b"\n") + 1].decode().splitlines()]


class Run:
    """A run whose children are killed.

    Args:
        folder: where it lies.
        chance: decides when.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance, self.epoch = folder, chance, 0
        self.url = f"sqlite:///{folder}/e.db"
        with ExperimentTracker("killed", database_url=self.url) as tracker:
            self.experiment = tracker.experiment_id
        self.expected: dict[str, int] = {}  # what must be there: id -> epoch

    def kill(self, mode: str, longest: float) -> list[list[str]]:
        return run_and_kill(self.folder, self.experiment, mode, self.epoch, self.chance.uniform(0.0, longest))

    def open(self) -> EnhancedCheckpointManager:
        return EnhancedCheckpointManager(None, self.folder / "c", database_url=self.url, max_checkpoints=None)

    def check(self, manager: EnhancedCheckpointManager) -> dict[str, int]:
        """Check that all that is listed is whole and as it was saved, and nothing else lies there; returns it."""
        rows = {row["checkpoint_id"]: row for row in manager.list_checkpoints(self.experiment)}
        published = {path.name for path in (self.folder / "c").glob("*/*") if path.parent.name != ".engine"}
        assert published == rows.keys(), "a partial or forgotten checkpoint is visible"
        assert os.listdir(self.folder / "c" / ".engine" / "staging") == []
        assert manager.verify_experiment_integrity(self.experiment)["failed"] == 0
        for checkpoint_id, row in rows.items():
            state = manager.load_checkpoint(checkpoint_id)["model_state_dict"]
            assert (state["epoch"], set(state["weights"])) == (row["epoch"], {float(row["epoch"])})
        if rows:
            best = max(rows, key=lambda each: rows[each]["epoch"])
            assert [each for each, row in rows.items() if row["is_best_loss"]] == [best]
            assert manager.load_checkpoint(experiment_id=self.experiment)["epoch"] == rows[best]["epoch"]
        return {checkpoint_id: row["epoch"] for checkpoint_id, row in rows.items()}

    def saves(self, mode: str, longest: float) -> int:
        """Kill a child that saves; returns how many of its saves were durable."""
        words = self.kill(mode, longest)
        called = {word[1]: int(word[2]) for word in words if word[0] == "called"}
        durable = {word[1]: called[word[1]] for word in words if word[0] == "durable"}
        self.epoch += 1000
        with self.open() as manager:
            found = self.check(manager)
            mine = [checkpoint_id for checkpoint_id in called if checkpoint_id in found]
            if mode == "async":
                assert self.expected.keys() | durable.keys() <= found.keys(), "a durable checkpoint is gone"
                assert mine == list(called)[: len(mine)], "a later one was committed before an earlier one"
            elif durable:
                assert max(found.values()) >= max(durable.values()), "the newest or the best is gone"
            assert not (self.expected and not found)
            for checkpoint_id in list(found)[:-8]:  # the run stays small
                manager.delete_checkpoint(checkpoint_id)
                del found[checkpoint_id]
            manager.empty_trash()
        self.expected = found
        return len(durable)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "short", "long"), [("async", 30, 600), ("gc", 25, 500)])
def test_kills_amid_background_saves_and_garbage_collection_lose_nothing_durable(
    mode: str,
    short: int,
    long: int,
    tmp_path: Path,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    run, kills, durable = Run(tmp_path, chance), effort(short, long), 0
    for _ in range(kills):
        durable += run.saves(mode, 0.12)
    assert durable > kills / 4
    tried(kills)


@pytest.mark.slow
def test_kills_amid_recovery_and_rebuilding_lose_nothing(
    tmp_path: Path, chance: random.Random, effort: Callable[[int, int], int], tried: Callable[[int], None]
) -> None:
    run, kills = Run(tmp_path, chance), effort(25, 500)
    with ExperimentTracker.resume(run.experiment, run.url) as tracker:
        with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None) as manager:
            for epoch in range(1, 9):
                state = {"epoch": epoch, "weights": array("d", [epoch]) * 20_000}
                saved = manager.save_checkpoint(state, epoch=epoch, loss=1 / epoch)
                run.expected[saved] = epoch
    for _ in range(kills):
        lost = chance.sample(sorted(run.expected), chance.randrange(1, 6))
        with contextlib.closing(sqlite3.connect(tmp_path / "e.db", timeout=30)) as connection, connection:
            for checkpoint_id in lost:
                for table, column in (("best", "checkpoint_id"), ("files", "checkpoint_id"), ("checkpoints", "id")):
                    if table == "checkpoints":
                        connection.execute("DELETE FROM verifications WHERE checkpoint_id = ?", (checkpoint_id,))
                    connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (checkpoint_id,))
        for _ in range(3):  # what saves leave that were killed
            staged = tmp_path / "c" / ".engine" / "staging" / str(uuid.uuid4())
            staged.mkdir()
            (staged / "model.safetensors").write_bytes(bytes(1000))
        run.kill("recovery", 0.08)
        with run.open() as manager:
            assert run.check(manager) == run.expected
    tried(kills)


def widen(connection: schema.Executes, types: object) -> None:
    """The child's migration."""
    connection.execute("CREATE TABLE wider AS SELECT *, 'new' AS added FROM checkpoints")
    connection.execute("DROP TABLE checkpoints")
    connection.execute("ALTER TABLE wider RENAME TO checkpoints")


@pytest.mark.slow
def test_kills_amid_a_migration_leave_the_old_or_the_new_database_whole(
    tmp_path: Path,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "old").mkdir()
    run, kills = Run(tmp_path / "old", chance), effort(20, 400)
    run.open().close()
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "e.db")) as connection, connection:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
            "INSERT INTO checkpoints SELECT 'id ' || i, (SELECT id FROM experiments), (SELECT id FROM stores), i, "
            "'failed', 'regular', i, 0, '{}', 'x', 0, 0, 0, 1, NULL, NULL, '', 0 FROM n"
        )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    known = schema.latest_version()
    versions: list[int] = []
    longest = 0.12  # seconds; it follows how long a migration takes here and now, so that kills come before and after
    for number in range(kills):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", folder)
        words = run_and_kill(folder, run.experiment, "migration", 0, chance.uniform(0.0, longest))
        with contextlib.closing(sqlite3.connect(folder / "e.db", timeout=30)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            (version,) = connection.execute("SELECT MAX(number) FROM migrations").fetchone()
            names = [row[1] for row in connection.execute("PRAGMA table_info(checkpoints)")]
            assert ("added" in names) == (version == known + 1)
            assert connection.execute("SELECT COUNT(*), SUM(epoch) FROM checkpoints").fetchone() == (20000, 200010000)
            assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'wider'").fetchall() == []
        assert version in ((known + 1,) if ["migrated"] in words else (known, known + 1))
        versions.append(version)
        longest *= 1.25 if version == known else 0.9
        with monkeypatch.context() as patch:
            patch.setattr(schema, "_MIGRATIONS", [*schema._MIGRATIONS, widen])
            database = EnhancedDatabaseConnection(f"sqlite:///{folder}/e.db")
            assert database.query("SELECT COUNT(*) FROM checkpoints WHERE added = 'new'") == [(20000,)]
            database.close()
        shutil.rmtree(folder)
    assert len(set(versions)) == 2 or kills < 15, "no kill came in the midst"
    tried(kills)
