"""Recovery at opening: after kills at every step, lost databases, damage, and things that it does not know."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import reseal

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.checkpoint.recovery import RecoveryReport, recover
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import CheckpointNotFoundError, IntegrityError

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0  # seconds that another process may take before it counts as hung
MODEL = {"weight": array("f", [1.0, 2.0, 3.0]), "n": 7}

# Runs ``call`` and dies of SIGKILL at ``place``: while a storage backend writes, at a system call, or at the n-th
# transaction. ``when`` is before or after that.
CHILD = """
import os, shutil, signal, sys
from array import array
from contextlib import contextmanager
from model_checkpoint import EnhancedCheckpointManager, register_storage_backend
from model_checkpoint.checkpoint.storage import PlannedFile, StorageBackend
from model_checkpoint.database.sqlite_pool import SQLitePool

folder, experiment, place, when, call = sys.argv[1:]

class Dying(StorageBackend):
    name = "dying"

    def plan(self, state, max_shard_size):
        return [PlannedFile("first.bin", "model", None, whole), PlannedFile("second.bin", "model", None, half)]

    def read(self, files):
        return {}

def whole(sink):
    sink.write(b"whole")

def half(sink):
    sink.write(b"half")
    if place == "write":
        die()
    print("writing", flush=True)
    sys.stdin.readline()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(real):
    def run(*arguments, **options):
        if when == "after":
            real(*arguments, **options)
        die()
    return run

def dying_at(number, real):
    begun, open_now = 0, 0

    @contextmanager
    def transaction(self, durable=False):
        nonlocal begun, open_now
        begun += not open_now  # those inside another one are part of it
        if begun == number and when == "before":
            die()
        open_now += 1
        with real(self, durable) as connection:
            yield connection
        open_now -= 1
        if begun == number and not open_now:
            die()
    return transaction

def open_manager(backend="safetensors"):
    url = f"sqlite:///{folder}/experiments.db"
    return EnhancedCheckpointManager(  # one thread, so that files are written in their order
        None, folder + "/checkpoints", storage_backend=backend, database_url=url, io_threads=1
    )

register_storage_backend("dying", Dying)
if "manager." in call:
    manager = open_manager("dying" if place in ("write", "wait") else "safetensors")
if place in ("rename", "unlink", "rmdir"):
    setattr(os, place, dying(getattr(os, place)))
elif place.startswith("transaction"):
    SQLitePool.transaction = dying_at(int(place[-1]), SQLitePool.transaction)
print(eval(call), flush=True)
"""

SAVE = "manager.save_checkpoint({'w': array('f', [2.0])}, epoch=9, loss=0.125, experiment_id=experiment)"


class World:
    """A database and a checkpoint directory, with an experiment whose checkpoints a test makes and loses.

    Args:
        folder: where both are.
        tracker: further arguments of the tracker.
    """

    def __init__(self, folder: Path, **tracker: Any) -> None:
        self.folder = folder
        self.directory = folder / "checkpoints"
        self.engine = self.directory / ".engine"
        self.database = folder / "experiments.db"
        with ExperimentTracker("run", database_url=self.url, **tracker) as made:
            self.experiment = made.experiment_id

    @property
    def url(self) -> str:
        return f"sqlite:///{self.database}"

    @contextlib.contextmanager
    def open(self, **options: Any) -> Iterator[EnhancedCheckpointManager]:
        with EnhancedCheckpointManager(None, str(self.directory), database_url=self.url, **options) as manager:
            yield manager

    def save(self, *rows: dict[str, Any], **options: Any) -> list[str]:
        """Save checkpoints of the experiment; the epoch is the place where a row says nothing else."""
        with self.open(max_checkpoints=None, **options) as manager:
            return [
                manager.save_checkpoint(MODEL, **{"epoch": i, "experiment_id": self.experiment, **row})
                for i, row in enumerate(rows)
            ]

    def recover(self) -> RecoveryReport | None:
        """Recover, and return the report, which the manager keeps to itself."""
        database = EnhancedDatabaseConnection(self.url)
        try:
            directory = CheckpointDirectory(self.directory)
            database.stores.open(directory.store_id, directory.path)
            return recover(directory, database, {})
        finally:
            database.close()

    def listed(self, **options: Any) -> list[dict[str, Any]]:
        with self.open(**options) as manager:
            return manager.list_checkpoints()

    def ids(self) -> list[str]:
        return [row["checkpoint_id"] for row in self.listed()]

    def statuses(self) -> dict[str, str]:
        """Return id -> status of every row, read without the package."""
        return dict(self.sql("SELECT id, status FROM checkpoints ORDER BY sequence"))

    def published(self, checkpoint_id: str) -> Path:
        return self.directory / self.experiment / checkpoint_id

    def staged(self) -> list[str]:
        return os.listdir(self.engine / "staging")

    def sql(self, statement: str, *binds: object) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            return connection.execute(statement, binds).fetchall()

    def forget_row(self, checkpoint_id: str) -> None:
        """Bring the database to where it was before the checkpoint's intent was stored."""
        for table, column in (("files", "checkpoint_id"), ("best", "checkpoint_id"), ("checkpoints", "id")):
            self.sql(f"DELETE FROM {table} WHERE {column} = ?", checkpoint_id)

    def lose_database(self, suffixes: tuple[str, ...] = ("", "-wal", "-shm", "-lock")) -> None:
        for suffix in suffixes:
            Path(f"{self.database}{suffix}").unlink(missing_ok=True)

    def tree(self) -> dict[str, str]:
        """Return path -> kind and content of everything in the checkpoint directory."""
        return {str(path.relative_to(self.directory)): told(path) for path in sorted(self.directory.rglob("*"))}

    def dump(self) -> list[str]:
        """Return the whole database as text."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return list(connection.iterdump())

    def child(self, place: str, when: str, call: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(self.folder), self.experiment, place, when, call]
        return subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def kill(self, place: str, when: str, call: str = SAVE) -> None:
        """Run ``call`` in another process until it dies there."""
        with self.child(place, when, call) as child:
            _, errors = child.communicate(timeout=DEADLINE)
        assert child.returncode == -9, errors


def told(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return "folder" if path.is_dir() else "special"


def epochs(rows: list[dict[str, Any]]) -> list[int]:
    return [row["epoch"] for row in rows]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# Kills: whatever was acknowledged is there, whatever was not is there whole or not at all


@pytest.mark.parametrize(
    ("place", "when", "survives"),
    [
        ("transaction 1", "before", False),  # the intent
        ("transaction 1", "after", False),
        ("write", "during", False),
        ("rename", "before", False),
        ("rename", "after", True),
        ("transaction 2", "before", True),  # the commit
        ("transaction 2", "after", True),
    ],
)
def test_a_save_that_was_killed_is_there_whole_or_leaves_nothing(
    world: World, place: str, when: str, survives: bool
) -> None:
    (first,) = world.save({"loss": 0.5})
    world.kill(place, when)
    assert len(world.staged()) == (place == "write" or (place, when) == ("rename", "before"))
    with world.open() as manager:
        rows = manager.list_checkpoints()
        assert epochs(rows) == ([0, 9] if survives else [0])
        best = manager.load_checkpoint(experiment_id=world.experiment, checkpoint_type="best_loss")
        assert best["epoch"] == (9 if survives else 0)
        assert manager.load_checkpoint(first)["model_state_dict"] == MODEL
        assert manager.verify_experiment_integrity()["failed"] == 0
        saved = manager.save_checkpoint(MODEL, experiment_id=world.experiment)  # and training goes on
        assert manager.load_checkpoint(experiment_id=world.experiment)["_checkpoint_metadata"]["checkpoint_id"] == saved
    assert world.staged() == []
    assert "saving" not in world.statuses().values()
    assert len(list(world.directory.glob("*/*/checkpoint.json"))) == (3 if survives else 2)


def test_what_a_kill_while_writing_left_is_reported_as_discarded_and_failed(world: World) -> None:
    (kept,) = world.save({})
    world.kill("write", "during")
    (staged,) = world.staged()
    assert sorted(os.listdir(world.engine / "staging" / staged)) == ["first.bin", "second.bin"]
    assert world.statuses() == {kept: "committed", staged: "saving"}
    report = world.recover()
    assert report == RecoveryReport(discarded=[staged], failed=[staged])
    assert world.statuses() == {kept: "committed", staged: "failed"}
    assert world.staged() == []


@pytest.mark.parametrize(
    ("place", "when", "removed"),
    [
        ("transaction 1", "before", False),  # the tombstone
        ("transaction 1", "after", True),
        ("rename", "before", True),
        ("rename", "after", True),
    ],
)
def test_a_deletion_that_was_killed_happened_whole_or_not_at_all(
    world: World, place: str, when: str, removed: bool
) -> None:
    other, doomed = world.save({"loss": 2.0}, {"loss": 1.0})
    world.kill(place, when, f"manager.delete_checkpoint({doomed!r})")
    with world.open() as manager:
        assert epochs(manager.list_checkpoints()) == ([0] if removed else [0, 1])
        best = manager.load_checkpoint(experiment_id=world.experiment, checkpoint_type="best_loss")
        assert best["epoch"] == (0 if removed else 1)
        assert world.published(doomed).exists() is not removed
        assert [row["checkpoint_id"] for row in manager.list_trash()] == [doomed] * removed
        if removed:
            manager.undelete(doomed)
        assert manager.load_checkpoint(doomed)["model_state_dict"] == MODEL
        assert manager.load_checkpoint(other)["model_state_dict"] == MODEL


@pytest.mark.parametrize(("place", "when"), [("rename", "before"), ("rename", "after"), ("transaction 1", "before")])
def test_an_undelete_that_was_killed_leaves_the_checkpoint_in_the_trash(world: World, place: str, when: str) -> None:
    (deleted,) = world.save({"loss": 1.0})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    world.kill(place, when, f"manager.undelete({deleted!r})")
    assert world.published(deleted).exists() is ((place, when) != ("rename", "before"))
    with world.open() as manager:
        assert manager.list_checkpoints() == []
        assert [row["checkpoint_id"] for row in manager.list_trash()] == [deleted]
        assert not world.published(deleted).exists()
        manager.undelete(deleted)
        assert manager.load_checkpoint(deleted)["model_state_dict"] == MODEL


@pytest.mark.parametrize(
    ("place", "when", "purged"),
    [
        ("transaction 1", "before", False),
        ("transaction 1", "after", True),
        ("unlink", "before", True),
        ("unlink", "after", True),
        ("rmdir", "before", True),
    ],
)
def test_emptying_the_trash_that_was_killed_happened_or_can_be_repeated(
    world: World, place: str, when: str, purged: bool
) -> None:
    kept, deleted = world.save({}, {})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    world.kill(place, when, "manager.empty_trash()")
    assert os.listdir(world.engine / "trash") == [deleted]
    report = world.recover()
    assert report is not None
    assert report.purged == [deleted] * purged
    assert os.listdir(world.engine / "trash") == [deleted] * (not purged)
    with world.open() as manager:
        assert [row["checkpoint_id"] for row in manager.list_trash()] == [deleted] * (not purged)
        assert manager.load_checkpoint(kept)["model_state_dict"] == MODEL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "when"),
    [
        *((place, when) for place in ("rmdir", "unlink", "rename") for when in ("before", "after")),
        *((f"transaction {n}", "before") for n in (1, 2, 3, 4, 5)),
        ("transaction 5", "after"),
    ],
)
def test_a_recovery_that_was_killed_is_finished_by_the_next(world: World, place: str, when: str) -> None:
    ids = crashed_in_every_way(world)
    world.kill(place, when, "open_manager()")
    assert_recovered(world, ids)


def crashed_in_every_way(world: World) -> dict[str, str]:
    """Leave what every kind of crash leaves behind, all in one directory; returns name -> id."""
    names = ("kept", "lost", "resized", "rolled", "rowless", "buried", "trashed", "purged")
    ids = dict(zip(names, world.save(*({"loss": 9.0 - i} for i in range(len(names))))))
    with world.open() as manager:
        manager.delete_checkpoint(ids["purged"])
        manager.delete_checkpoint(ids["trashed"])
        manager.delete_checkpoint(ids["buried"])
    # Where a kill after the tombstone, and one after the rows of the trash went, leave things:
    (world.engine / "trash" / ids["buried"]).rename(world.published(ids["buried"]))
    world.sql("UPDATE tombstones SET purged_at = 1.0 WHERE checkpoint_id = ?", ids["purged"])
    world.forget_row(ids["purged"])
    # Published, with the intent as a row only, and with none:
    world.sql("UPDATE checkpoints SET status = 'saving', size = 0 WHERE id = ?", ids["rolled"])
    for table in ("files", "best"):
        world.sql(f"DELETE FROM {table} WHERE checkpoint_id = ?", ids["rolled"])
    world.forget_row(ids["rowless"])
    # Damage:
    shutil.rmtree(world.published(ids["lost"]))
    (world.published(ids["resized"]) / "state.json").write_bytes(b"")
    # Last, because the child that dies while it saves opens the directory and would recover the rest.
    garbage = world.engine / "staging" / str(uuid.uuid4())
    garbage.mkdir()
    (garbage / "model.safetensors").write_bytes(b"half")
    ids["garbage"] = garbage.name
    world.sql(
        "INSERT INTO checkpoints (id, experiment_id, store_id, sequence, status, checkpoint_type, epoch, step, "
        "details, backend, size, created_at, pinned, update_best, owner) SELECT ?, experiment_id, store_id, 99, "
        "'saving', checkpoint_type, epoch, step, details, backend, 0, created_at, 0, update_best, owner "
        "FROM checkpoints WHERE id = ?",
        *(garbage.name, ids["kept"]),
    )
    return ids


def assert_recovered(world: World, ids: dict[str, str]) -> None:
    names = {checkpoint_id: name for name, checkpoint_id in ids.items()}
    with world.open() as manager:
        rows = manager.list_checkpoints()
        status = {names[row["checkpoint_id"]]: row["status"] for row in rows}
        assert status == {
            **dict.fromkeys(("kept", "rolled", "rowless"), "committed"),
            **dict.fromkeys(("lost", "resized"), "corrupt"),
        }
        assert {names[row["checkpoint_id"]] for row in manager.list_trash()} == {"buried", "trashed"}
        best = manager.load_checkpoint(experiment_id=world.experiment, checkpoint_type="best_loss")
        assert names[best["_checkpoint_metadata"]["checkpoint_id"]] == "rowless"
        for name in ("kept", "rolled", "rowless"):
            assert manager.load_checkpoint(ids[name])["model_state_dict"] == MODEL
    assert world.statuses()[ids["garbage"]] == "failed"
    assert world.staged() == []
    assert {names[name] for name in os.listdir(world.engine / "trash")} == {"buried", "trashed"}
    assert {names[path.parent.name] for path in world.directory.glob("*/*/checkpoint.json")} == {
        *("kept", "resized", "rolled", "rowless"),
    }


def test_everything_at_once_is_recovered_and_reported(world: World) -> None:
    ids = crashed_in_every_way(world)
    report = world.recover()
    assert report == RecoveryReport(
        rolled_forward=[ids["rolled"], ids["rowless"]],  # in the order in which they were saved
        discarded=[ids["garbage"]],
        failed=[ids["garbage"]],
        corrupt=[ids["lost"], ids["resized"]],
        buried=[ids["buried"]],
        purged=[ids["purged"]],
    )
    assert_recovered(world, ids)


def test_recovery_twice_is_the_same_as_once(world: World) -> None:
    crashed_in_every_way(world)
    assert world.recover()
    tree, dump = world.tree(), world.dump()
    report = world.recover()
    assert report is not None
    assert not report
    with world.open():
        pass
    assert world.tree() == tree
    assert world.dump() == dump


def test_opening_what_nothing_happened_to_changes_nothing(world: World) -> None:
    world.save({"loss": 1.0}, {"loss": 0.5})
    tree, dump = world.tree(), world.dump()
    with world.open():
        pass
    assert world.tree() == tree
    assert world.dump() == dump


# Published without a committed row


@pytest.mark.parametrize("status", ["saving", "failed"])
def test_what_was_published_is_committed_whatever_its_row_says(world: World, status: str) -> None:
    before, one = world.save({"loss": 2.0}, {"loss": 1.0, "metrics": {"f1": 0.5}, "notes": "n"})
    (described,) = (row for row in world.listed() if row["checkpoint_id"] == one)
    world.sql("UPDATE checkpoints SET status = ?, size = 0 WHERE id = ?", status, one)
    world.sql("DELETE FROM files WHERE checkpoint_id = ?", one)
    world.sql("DELETE FROM best WHERE checkpoint_id = ?", one)
    report = world.recover()
    assert report == RecoveryReport(rolled_forward=[one])
    rows = world.listed()
    assert [row["checkpoint_id"] for row in rows] == [before, one]
    assert rows[1] == described


def test_checkpoints_without_rows_come_back_in_the_order_in_which_they_were_saved(world: World) -> None:
    ids = world.save(*({} for _ in range(12)))
    for checkpoint_id in ids[4:]:
        world.forget_row(checkpoint_id)
    assert world.ids() == ids
    assert [row["sequence"] for row in world.listed()] == list(range(1, 13))


def test_what_is_rolled_forward_takes_a_flag_only_when_it_is_better(world: World) -> None:
    ids = world.save({"loss": 2.0}, {"loss": 2.0}, {"loss": math.nan}, {"loss": 3.0})
    for checkpoint_id in ids[1:]:
        world.forget_row(checkpoint_id)
    assert [row["is_best_loss"] for row in world.listed()] == [True, False, False, False]


def test_the_overrides_of_best_metrics_count_in_recovery_too(world: World) -> None:
    overrides = {"f1": "min"}
    _, second = world.save({"metrics": {"f1": 0.9}}, {"metrics": {"f1": 0.1}}, best_metrics=overrides)
    world.forget_row(second)
    assert [row["best"] for row in world.listed(best_metrics=overrides)] == [[], ["metrics.f1"]]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_last_byte(folder / "model.safetensors"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 20),
        lambda folder: (folder / "checkpoint.json").unlink(),
        lambda folder: (folder / "checkpoint.json").write_text("{"),
        lambda folder: flip_last_byte(folder / "checkpoint.json"),
        lambda folder: os.truncate(folder / "checkpoint.json", 0),
    ],
    ids=["flipped bit", "file missing", "truncated", "no manifest", "broken", "manifest changed", "manifest empty"],
)
def test_what_was_published_without_a_row_and_is_not_whole_is_left_alone_and_reported(
    world: World, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    kept, broken = world.save({"loss": 2.0}, {"loss": 1.0})
    world.forget_row(broken)
    damage(world.published(broken))
    tree = world.tree()
    report = world.recover()
    assert report == RecoveryReport(left_alone=[broken])
    assert any(broken in message and "left as it is" in message for message in caplog.messages)
    assert world.ids() == [kept]
    assert world.tree() == tree
    with world.open() as manager, pytest.raises(CheckpointNotFoundError):
        manager.load_checkpoint(broken)


# A database that was lost

NESTED = {"lr": 0.1, "layers": [1, {"$float": "x"}], "eps": math.inf, "nan": math.nan}


@pytest.mark.parametrize("suffixes", [("", "-wal", "-shm", "-lock"), ("",)], ids=["all its files", "the file alone"])
def test_all_comes_back_from_the_manifests_when_the_database_is_lost(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    world = World(tmp_path, project_name="p", tags=["a", 2], config=NESTED, metadata={"host": "h"})
    world.save(
        {"epoch": 5, "step": 70, "loss": 1.0, "val_loss": math.nan, "metrics": {"f1": 0.5, "wer": math.inf}},
        {"epoch": 4, "loss": 2.0, "config": NESTED, "notes": "n\u0301", "model_name": "tiny"},
        {"epoch": 3, "loss": -math.inf, "update_best": False, "checkpoint_type": "milestone"},
        {"epoch": 2, "loss": 0.5, "val_loss": 0.25, "metrics": {"f1": 0.5}},
        {"epoch": 1, "loss": 0.5},
    )
    rows = world.listed()
    database = EnhancedDatabaseConnection(world.url)
    before = database.experiments.get(world.experiment)
    database.close()
    world.lose_database(suffixes)
    tree = world.tree()
    assert repr(world.listed()) == repr(rows)  # as text: NaN is not equal to itself
    assert [row["best"] for row in rows] == [["metrics.f1", "metrics.wer"], [], [], ["loss", "val_loss"], []]
    assert world.tree() == tree
    with ExperimentTracker.resume(world.experiment, world.url) as tracker:
        after = tracker.record
        names = ("id", "name", "project", "created_at", "metadata", "tags", "parent_id")
        assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
        assert str(dict(sorted(after.config.items()))) == str(dict(sorted(NESTED.items())))
        with EnhancedCheckpointManager(tracker, str(world.directory), max_checkpoints=None) as manager:
            loaded = manager.load_checkpoint(checkpoint_type="milestone")
            assert (loaded["epoch"], loaded["model_state_dict"]) == (3, MODEL)
            assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 2
            assert manager.verify_experiment_integrity()["verified"] == 5
            manager.save_checkpoint(MODEL, epoch=6)
            assert manager.load_checkpoint()["epoch"] == 6


def test_an_experiment_found_by_its_manifests_counts_as_interrupted(world: World) -> None:
    world.save({})
    world.lose_database()
    world.listed()
    assert world.sql("SELECT id, status FROM experiments") == [(world.experiment, "interrupted")]


def test_the_order_survives_the_loss_of_one_database_after_the_other(world: World) -> None:
    ids = world.save(*({} for _ in range(6)))
    with world.open() as manager:
        for checkpoint_id in ids[:4]:  # so that a rebuilt database counts from a lower number than the manifests
            manager.delete_checkpoint(checkpoint_id)
        manager.empty_trash()
    expected = ids[4:]
    for epoch in (6, 7, 8):
        world.lose_database()
        with world.open() as manager:
            expected.append(manager.save_checkpoint(MODEL, epoch=epoch, experiment_id=world.experiment))
            assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == expected
    world.lose_database()
    assert world.ids() == expected


def test_best_metric_means_the_same_metric_after_the_database_was_lost(world: World) -> None:
    world.save({"metrics": {"wer": 0.5, "accuracy": 0.5}}, {"metrics": {"wer": 0.4, "accuracy": 0.4}})
    before = [row["is_best_metric"] for row in world.listed()]
    world.lose_database()
    assert [row["is_best_metric"] for row in world.listed()] == before == [False, True]


@pytest.mark.parametrize("child_first", [True, False])
def test_a_parent_experiment_comes_back_as_the_parent(world: World, child_first: bool) -> None:
    with ExperimentTracker("child", database_url=world.url, parent=world.experiment) as tracker:
        child = tracker.experiment_id
    for experiment in (child, world.experiment) if child_first else (world.experiment, child):
        world.save({"experiment_id": experiment})
    world.lose_database()
    world.listed()
    parents = dict(world.sql("SELECT id, parent_id FROM experiments"))
    assert parents == {world.experiment: None, child: world.experiment}


def test_a_parent_that_has_no_checkpoint_does_not_keep_its_child_from_coming_back(world: World) -> None:
    with ExperimentTracker("child", database_url=world.url, parent=world.experiment) as tracker:
        child = tracker.experiment_id
    ids = world.save({"experiment_id": child})
    world.lose_database()
    assert world.ids() == ids


def test_two_experiments_in_one_directory_come_back_apart(world: World) -> None:
    with ExperimentTracker("other", database_url=world.url) as tracker:
        other = tracker.experiment_id
    mine, theirs = world.save({"loss": 1.0}, {"loss": 2.0, "experiment_id": other})
    world.lose_database()
    with world.open() as manager:
        assert [row["checkpoint_id"] for row in manager.list_checkpoints(world.experiment)] == [mine]
        assert [row["checkpoint_id"] for row in manager.list_checkpoints(other)] == [theirs]
        assert all(row["is_best_loss"] for row in manager.list_checkpoints())


def test_the_trash_is_found_by_a_new_database_and_undelete_works(world: World) -> None:
    kept, deleted = world.save({"loss": 2.0}, {"loss": 1.0})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    world.lose_database()
    report = world.recover()
    assert report == RecoveryReport(rolled_forward=[kept], readmitted=[deleted])
    with world.open() as manager:
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [kept]
        assert [row["is_best_loss"] for row in manager.list_checkpoints()] == [True]
        (found,) = manager.list_trash()
        assert (found["checkpoint_id"], found["experiment_id"]) == (deleted, world.experiment)
        manager.undelete(deleted)
        assert manager.load_checkpoint(deleted)["model_state_dict"] == MODEL
        best = manager.load_checkpoint(experiment_id=world.experiment, checkpoint_type="best_loss")
        assert best["epoch"] == 1


def test_the_trash_found_by_a_new_database_can_be_emptied_and_stays_empty(world: World) -> None:
    (deleted,) = world.save({})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    world.lose_database()
    with world.open() as manager:
        assert manager.empty_trash() > 0
    assert os.listdir(world.engine / "trash") == []
    with world.open() as manager:
        assert (manager.list_trash(), manager.list_checkpoints()) == ([], [])


# Committed rows with bad files


def become_a_link(folder: Path) -> None:
    away = folder.parents[2] / "away"
    folder.rename(away)
    folder.symlink_to(away)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def move_to_another_experiment(folder: Path) -> None:
    other = folder.parents[1] / str(uuid.uuid4())
    other.mkdir()
    folder.rename(other / folder.name)


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: shutil.rmtree(folder.parent),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "checkpoint.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 20),
        lambda folder: os.truncate(folder / "state.json", 0),
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        become_a_file,
        become_a_link,
        move_to_another_experiment,
    ],
    ids=[
        *("folder missing", "experiment missing", "file missing", "manifest missing", "truncated", "emptied", "grown"),
        *("file for folder", "link for folder", "elsewhere"),
    ],
)
def test_a_committed_checkpoint_with_bad_files_is_marked_corrupt_and_nothing_is_removed(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    with ExperimentTracker("other", database_url=world.url) as tracker:
        other = tracker.experiment_id
    kept, broken = world.save({"experiment_id": other}, {"loss": 1.0})
    damage(world.published(broken))
    tree = world.tree()
    with world.open() as manager:
        status = {row["checkpoint_id"]: row["status"] for row in manager.list_checkpoints()}
        assert status == {kept: "committed", broken: "corrupt"}
        assert any(f"checkpoint {broken} is corrupt" in message for message in caplog.messages)
        assert world.tree() == tree
        if damage is not become_a_link:  # what a link points to is whole
            with pytest.raises(IntegrityError):
                manager.load_checkpoint(broken)
        assert manager.load_checkpoint(kept)["model_state_dict"] == MODEL
    report = world.recover()
    assert report is not None
    assert report.corrupt == []  # it was reported when it was found


def test_a_checkpoint_that_was_repaired_is_committed_again_when_it_is_verified(world: World) -> None:
    (broken,) = world.save({"loss": 1.0})
    path = world.published(broken) / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    assert [row["status"] for row in world.listed()] == ["corrupt"]
    path.write_bytes(content)
    with world.open() as manager:
        assert manager.verify_experiment_integrity()["failed"] == 0
        assert [(row["status"], row["is_best_loss"]) for row in manager.list_checkpoints()] == [("committed", True)]


def test_a_corrupt_checkpoint_that_was_deleted_and_undeleted_still_counts_as_corrupt(world: World) -> None:
    (broken,) = world.save({"loss": 1.0})
    flip_last_byte(world.published(broken) / "model.safetensors")  # of the same length: only hashing finds it
    with world.open() as manager:
        assert manager.verify_experiment_integrity()["failed"] == 1
        manager.delete_checkpoint(broken)
        manager.undelete(broken)
        assert [row["status"] for row in manager.list_checkpoints()] == ["corrupt"]


# What recovery does not know is left alone


def put_file(*parts: str) -> Callable[[World], None]:
    def make(world: World) -> None:
        path = world.directory.joinpath(*(world.experiment if part == "EXPERIMENT" else part for part in parts))
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")

    return make


def put_folder(*parts: str) -> Callable[[World], None]:
    return lambda world: put_file(*parts, "file")(world)


def put_link(*parts: str) -> Callable[[World], None]:
    """Put a link to a folder outside, which holds a whole checkpoint of another directory."""

    def make(world: World) -> None:
        outside = world.folder / "outside"
        outside.mkdir()
        other = World(outside)
        (saved,) = other.save({"epoch": 77})
        target = {"experiment": other.directory / other.experiment, "checkpoint": other.published(saved)}[parts[0]]
        name = {"experiment": other.experiment, "checkpoint": saved}[parts[0]]
        place = [world.experiment if part == "EXPERIMENT" else part for part in parts[1:]]
        world.directory.joinpath(*place, name).symlink_to(target)

    return make


def put_empty(*parts: str) -> Callable[[World], None]:
    def make(world: World) -> None:
        world.directory.joinpath(*(world.experiment if part == "EXPERIMENT" else part for part in parts)).mkdir()

    return make


def another_checkpoint(change: Callable[[World, Path], object]) -> Callable[[World], None]:
    """Put a published checkpoint without a row, changed so that it is not one of ours any more."""

    def make(world: World) -> None:
        (saved,) = world.save({})
        world.forget_row(saved)
        change(world, world.published(saved))

    return make


def rename_checkpoint(world: World, folder: Path) -> None:
    folder.rename(folder.with_name(str(uuid.uuid4())))


def into_another_experiment(world: World, folder: Path) -> None:
    move_to_another_experiment(folder)


def claim(**told_otherwise: object) -> Callable[[World, Path], object]:
    def change(world: World, folder: Path) -> None:
        reseal(folder, lambda manifest: manifest.update(told_otherwise))

    return change


def claim_experiment(world: World, folder: Path) -> None:
    reseal(folder, lambda manifest: manifest["experiment"].update(id=str(uuid.uuid4())))


def climb(world: World, folder: Path) -> None:
    reseal(folder, lambda manifest: manifest["experiment"].update(id=f"../{world.experiment}"))


UUID = str(uuid.uuid4())
UNKNOWN = {
    "a file": put_file("notes.txt"),
    "lost+found": put_empty("lost+found"),
    "a folder that is no UUID": put_folder("backup-2024"),
    "a UUID in capitals": put_folder(UUID.upper()),
    "a UUID without dashes": put_folder(UUID.replace("-", "")),
    "a file named by a UUID": put_file(UUID),
    "an empty folder named by a UUID": put_empty(UUID),
    "an experiment folder with a file in it": put_file(UUID, "notes.txt"),
    "a file beside checkpoints": put_file("EXPERIMENT", "notes.txt"),
    "a file named by a UUID beside checkpoints": put_file("EXPERIMENT", UUID),
    "an empty checkpoint folder": put_empty("EXPERIMENT", UUID),
    "a checkpoint folder with other files": put_folder("EXPERIMENT", UUID),
    "a file in the engine's folder": put_file(".engine", "notes.txt"),
    "a file in staging": put_file(".engine", "staging", "notes.txt"),
    "a folder in staging that is no UUID": put_folder(".engine", "staging", "mine"),
    "a file named by a UUID in staging": put_file(".engine", "staging", UUID),
    "a link in staging": put_link("checkpoint", ".engine", "staging"),
    "a file in the trash": put_file(".engine", "trash", "notes.txt"),
    "a file named by a UUID in the trash": put_file(".engine", "trash", UUID),
    "a folder in the trash that is no checkpoint": put_folder(".engine", "trash", UUID),
    "a link in the trash": put_link("checkpoint", ".engine", "trash"),
    "a link to an experiment": put_link("experiment"),
    "a link to a checkpoint": put_link("checkpoint", "EXPERIMENT"),
    "a broken manifest": another_checkpoint(lambda _, folder: (folder / "checkpoint.json").write_text("[]")),
    "a manifest of a newer version": another_checkpoint(claim(format_version=99)),
    "a manifest of another form": another_checkpoint(claim(files=5)),
    "a manifest of another experiment": another_checkpoint(claim_experiment),
    "a manifest whose experiment is a path": another_checkpoint(climb),
    "a checkpoint under another name": another_checkpoint(rename_checkpoint),
    "a checkpoint under another experiment": another_checkpoint(into_another_experiment),
}


@pytest.mark.parametrize("database", ["known", "lost"])
@pytest.mark.parametrize("thing", UNKNOWN)
def test_what_is_not_recognised_is_left_where_it_is(world: World, thing: str, database: str) -> None:
    saved = world.save({"loss": 1.0}, {"loss": 2.0})
    UNKNOWN[thing](world)
    if database == "lost":
        world.lose_database()
    tree = world.tree()
    with world.open() as manager:
        rows = manager.list_checkpoints()
        assert [row["checkpoint_id"] for row in rows] == saved
        assert [(row["status"], row["is_best_loss"]) for row in rows] == [("committed", True), ("committed", False)]
        assert manager.list_trash() == []
        assert manager.load_checkpoint(saved[0])["model_state_dict"] == MODEL
    assert world.tree() == tree
    with world.open() as manager:  # nor do opening again, saving, deleting and emptying the trash touch it
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == saved
        manager.delete_checkpoint(saved[0])
        manager.delete_checkpoint(saved[1])
        manager.empty_trash()
        manager.save_checkpoint(MODEL, experiment_id=world.experiment)
    left = world.tree()
    gone = {path for path in tree if path not in left}
    assert all(any(checkpoint_id in path for checkpoint_id in saved) for path in gone)
    assert {path: left[path] for path in tree if path not in gone} == {p: t for p, t in tree.items() if p not in gone}


def test_a_pipe_in_place_of_a_file_does_not_hang_the_one_who_opens(world: World) -> None:
    kept, *strange = world.save({}, {}, {})
    for checkpoint_id, name in zip(strange, ("checkpoint.json", "state.json")):
        world.forget_row(checkpoint_id)
        (world.published(checkpoint_id) / name).unlink()
        os.mkfifo(world.published(checkpoint_id) / name)
    # In a process of its own, so that a hang ends at the deadline.
    with world.child("", "", "[row['checkpoint_id'] for row in manager.list_checkpoints()]") as child:
        try:
            shown, errors = child.communicate(timeout=DEADLINE)
        finally:
            child.kill()
    assert shown == f"{[kept]}\n", errors


@pytest.mark.parametrize("content", [[], ["model.safetensors"], ["checkpoint.json", "state.json"]])
def test_garbage_in_staging_under_a_checkpoints_name_is_removed(world: World, content: list[str]) -> None:
    ids = world.save({})
    garbage = world.engine / "staging" / str(uuid.uuid4())
    garbage.mkdir()
    for name in content:
        (garbage / name).write_text("half")
    (world.engine / "staging" / "notes.txt").write_text("mine")
    report = world.recover()
    assert report == RecoveryReport(discarded=[garbage.name])
    assert world.staged() == ["notes.txt"]
    assert world.ids() == ids


def test_links_inside_garbage_are_removed_and_what_they_point_to_is_not(world: World) -> None:
    world.save({})
    outside = world.folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    garbage = world.engine / "staging" / str(uuid.uuid4())
    garbage.mkdir()
    (garbage / "link").symlink_to(outside)
    world.recover()
    assert world.staged() == []
    assert (outside / "precious").read_text() == "mine"


def test_a_manifest_in_the_trash_cannot_name_a_way_out_of_the_directory(world: World) -> None:
    (deleted,) = world.save({})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    trashed = world.engine / "trash" / deleted
    reseal(trashed, lambda manifest: manifest["experiment"].update(id="../../escaped"))
    world.lose_database()
    report = world.recover()
    assert report == RecoveryReport(left_alone=[deleted])
    with world.open() as manager:
        assert manager.list_trash() == []
        with pytest.raises(CheckpointNotFoundError):
            manager.undelete(deleted)
    assert trashed.is_dir()


# Deleted on purpose


def test_a_deletion_that_was_cut_short_is_finished_by_a_purge_too(world: World) -> None:
    kept, deleted = world.save({}, {})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
        (world.engine / "trash" / deleted).rename(world.published(deleted))  # as if the rename had never happened
        manager.empty_trash()
    for _ in range(3):
        assert world.ids() == [kept]
    assert not world.published(deleted).exists()


def test_a_checkpoint_copied_back_by_hand_while_it_is_in_the_trash_does_not_bar_the_directory(world: World) -> None:
    kept, deleted = world.save({}, {})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
    shutil.copytree(world.engine / "trash" / deleted, world.published(deleted))
    for _ in range(2):
        with world.open() as manager:
            assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [kept]
            assert [row["checkpoint_id"] for row in manager.list_trash()] == [deleted]
    assert (world.engine / "trash" / deleted / "checkpoint.json").exists()


def test_undelete_of_what_is_no_longer_in_the_trash_says_so_and_changes_nothing(world: World) -> None:
    kept, deleted = world.save({}, {})
    with world.open() as manager:
        manager.delete_checkpoint(deleted)
        shutil.rmtree(world.engine / "trash" / deleted)
        with pytest.raises(CheckpointNotFoundError):
            manager.undelete(deleted)
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [kept]


# Copies


def copy_below_other_experiments(world: World, checkpoint_id: str) -> list[Path]:
    """Copy a checkpoint below eight other experiments: in whatever order folders are listed, it is not the last."""
    copies = [world.directory / str(uuid.uuid4()) / checkpoint_id for _ in range(8)]
    for copy in copies:
        shutil.copytree(world.published(checkpoint_id), copy)
    return copies


def test_copies_below_other_experiments_do_not_hide_the_checkpoint_from_a_new_database(world: World) -> None:
    ids = world.save({"loss": 1.0})
    copy_below_other_experiments(world, ids[0])
    world.lose_database()
    with world.open() as manager:
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == ids
        assert manager.load_checkpoint(ids[0])["model_state_dict"] == MODEL


def test_broken_copies_below_other_experiments_do_not_make_the_checkpoint_corrupt(world: World) -> None:
    (saved,) = world.save({"loss": 1.0})
    for copy in copy_below_other_experiments(world, saved):
        (copy / "state.json").write_bytes(b"")
    tree = world.tree()
    assert [row["status"] for row in world.listed()] == ["committed"]
    assert world.tree() == tree


def test_the_other_directories_of_a_database_are_not_touched(world: World, tmp_path: Path) -> None:
    (mine,) = world.save({"loss": 1.0})
    elsewhere = str(tmp_path / "elsewhere")
    with EnhancedCheckpointManager(None, elsewhere, database_url=world.url) as manager:
        theirs = manager.save_checkpoint(MODEL, experiment_id=world.experiment, loss=2.0)
    world.sql("UPDATE checkpoints SET status = 'saving' WHERE id = ?", theirs)
    shutil.rmtree(elsewhere)
    assert world.ids() == [mine]
    assert world.statuses() == {mine: "committed", theirs: "saving"}


# Other processes


def test_recovery_is_skipped_while_another_process_saves_and_its_staging_is_not_touched(world: World) -> None:
    ids = world.save({"loss": 1.0}, {"loss": 2.0})
    shutil.rmtree(world.published(ids[1]))  # something that recovery would do
    # The child's own opening finds it too, so it is put back to what it was.
    with world.child("wait", "", SAVE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "writing\n"
            world.sql("UPDATE checkpoints SET status = 'committed' WHERE id = ?", ids[1])
            (staged,) = world.staged()
            tree, dump = world.tree(), world.dump()
            assert world.recover() is None
            with world.open() as manager:
                assert manager.load_checkpoint(ids[0])["model_state_dict"] == MODEL
            assert world.tree() == tree
            assert [line for line in world.dump() if "verifications" not in line] == [
                line for line in dump if "verifications" not in line
            ]
            shown, errors = child.communicate("\n", timeout=DEADLINE)
        finally:
            child.kill()
    assert shown == f"{staged}\n", errors
    assert world.statuses() == {ids[0]: "committed", ids[1]: "committed", staged: "committed"}
    report = world.recover()
    assert report == RecoveryReport(corrupt=[ids[1]])


def test_the_staging_of_a_save_whose_process_is_killed_is_garbage_at_once(world: World) -> None:
    with world.child("wait", "", SAVE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        (staged,) = world.staged()
        assert world.recover() is None
        child.kill()
        child.wait(DEADLINE)
    assert world.recover() == RecoveryReport(discarded=[staged], failed=[staged])


OPEN = """
import sys
from model_checkpoint import EnhancedCheckpointManager
print("ready", flush=True)
sys.stdin.readline()
with EnhancedCheckpointManager(None, sys.argv[1], database_url=sys.argv[2]) as manager:
    print(len(manager.list_checkpoints()), flush=True)
"""


@pytest.mark.parametrize("database", ["known", "lost"])
def test_four_processes_that_open_a_crashed_directory_at_once_recover_it_once(world: World, database: str) -> None:
    expected: dict[str, str] = {}
    if database == "known":
        expected = crashed_in_every_way(world)
    else:
        saved = world.save(*({"loss": float(i % 3)} for i in range(10)))
        world.lose_database()
    command = [sys.executable, "-c", OPEN, str(world.directory), world.url]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
            for _ in range(4)
        ]
        for child in children:
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            _, errors = child.communicate(timeout=DEADLINE)
            assert child.returncode == 0, errors
            assert "Traceback" not in errors
    if database == "known":
        assert_recovered(world, expected)
    else:
        rows = world.listed()
        assert [row["checkpoint_id"] for row in rows] == saved
        assert [row["sequence"] for row in rows] == list(range(1, 11))
        assert [row["epoch"] for row in rows if row["is_best_loss"]] == [0]
        assert world.sql("SELECT COUNT(*) FROM experiments") == [(1,)]
    with world.open() as manager:
        assert json.loads(json.dumps(manager.verify_experiment_integrity()))["total_checkpoints"] == len(world.ids())
