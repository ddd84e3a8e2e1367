"""Many threads on one manager, many processes on one directory, and races between two calls, one at a time.

Oracles live outside the store: what was acknowledged is written down when the call has returned.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, LockTimeoutError
from model_checkpoint.hooks import HookContext, HookEvent

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0  # seconds that anything may take before it counts as hung
THREADS, OPERATIONS = 8, 20
PROCESSES, ROUNDS = 4, 40


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    with EnhancedCheckpointManager(tracker, str(tmp_path / "checkpoints"), max_checkpoints=None) as manager:
        yield manager


@pytest.fixture
def chance() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return random.Random(seed)


def state_of(epoch: int) -> dict[str, Any]:
    """Return a state that tells which epoch it is of."""
    return {"weight": array("d", [epoch] * 50), "epoch": epoch}


def assert_each_flag_has_the_right_holder(rows: list[dict[str, Any]]) -> None:
    """Every criterion is held once, by the earliest of the best that are listed."""
    held = [criterion for row in rows for criterion in row["best"]]
    assert sorted(held) == (["loss", "metrics.f1"] if rows else [])
    if rows:
        least = min(range(len(rows)), key=lambda place: rows[place]["loss"])  # min and max keep the first of a tie
        most = max(range(len(rows)), key=lambda place: rows[place]["metrics"]["f1"])
        assert "loss" in rows[least]["best"]
        assert "metrics.f1" in rows[most]["best"]


class Ledger:
    """What the threads were told, written down after each call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.saved: dict[str, int] = {}  # id -> epoch
        self.pinned: dict[str, bool] = {}  # only the thread that saved a checkpoint pins and unpins it
        self.deleting: set[str] = set()  # from before the call, so that "not found" can be told from a loss
        self.deleted: set[str] = set()

    def any_id(self, chance: random.Random) -> str | None:
        with self.lock:
            return chance.choice(list(self.saved)) if self.saved else None


def work(manager: EnhancedCheckpointManager, ledger: Ledger, thread: int, chance: random.Random) -> None:
    """Do what the seed says, and check every answer as far as another thread cannot have changed it."""
    mine: list[str] = []
    for number in range(OPERATIONS):
        chosen = ledger.any_id(chance)
        action = chance.choices(["save", "load", "best", "list", "pin", "delete"], [8, 4, 2, 2, 3, 3])[0]
        if action == "save" or chosen is None:
            epoch = thread * 1000 + number
            scores = {"loss": chance.randrange(5), "metrics": {"f1": chance.randrange(5)}}
            saved = manager.save_checkpoint(state_of(epoch), epoch=epoch, **scores)
            mine.append(saved)
            with ledger.lock:
                ledger.saved[saved] = epoch
        elif action == "load":
            with expected_if_deleted(ledger, chosen):
                loaded = manager.load_checkpoint(chosen)
                assert loaded["model_state_dict"] == state_of(ledger.saved[chosen])
        elif action == "best":
            with contextlib.suppress(CheckpointNotFoundError):  # when all were deleted
                loaded = manager.load_checkpoint(checkpoint_type=chance.choice(["latest", "best_loss", "best_metric"]))
                assert loaded["model_state_dict"] == state_of(loaded["epoch"])
        elif action == "list":
            with ledger.lock:
                acknowledged = set(ledger.saved) - ledger.deleting
                gone = set(ledger.deleted)
            rows = manager.list_checkpoints()
            listed = [row["checkpoint_id"] for row in rows]
            assert len(listed) == len(set(listed))
            assert acknowledged - ledger.deleting <= set(listed)
            assert not gone & set(listed)
        elif action == "pin" and mine:
            own = chance.choice(mine)
            wanted = not ledger.pinned.get(own, False)
            with expected_if_deleted(ledger, own):
                (manager.pin if wanted else manager.unpin)(own)
                ledger.pinned[own] = wanted
        elif action == "delete":
            with ledger.lock:
                ledger.deleting.add(chosen)
            # A refusal is right when its owner has pinned it, or another thread was first.
            with contextlib.suppress(CheckpointNotFoundError, CheckpointPinned):
                delete_unpinned(manager, chosen)
                with ledger.lock:
                    ledger.deleted.add(chosen)


class CheckpointPinned(Exception):
    """A deletion was refused because the checkpoint is pinned."""


def delete_unpinned(manager: EnhancedCheckpointManager, checkpoint_id: str) -> None:
    try:
        manager.delete_checkpoint(checkpoint_id)
    except ConfigurationError as refusal:
        if "is pinned" not in str(refusal):
            raise
        raise CheckpointPinned from refusal


@contextlib.contextmanager
def expected_if_deleted(ledger: Ledger, checkpoint_id: str) -> Iterator[None]:
    try:
        yield
    except CheckpointNotFoundError:
        assert checkpoint_id in ledger.deleting


def test_threads_on_one_manager_lose_nothing_that_was_acknowledged(
    manager: EnhancedCheckpointManager, chance: random.Random, tmp_path: Path
) -> None:
    ledger = Ledger()
    with ThreadPoolExecutor(THREADS) as pool:
        seeds = [random.Random(chance.random()) for _ in range(THREADS)]
        tasks = [pool.submit(work, manager, ledger, thread, seed) for thread, seed in enumerate(seeds)]
        for task in tasks:
            task.result(timeout=DEADLINE)
    rows = manager.list_checkpoints()
    expected = set(ledger.saved) - ledger.deleted
    assert {row["checkpoint_id"] for row in rows} == expected
    assert {row["checkpoint_id"]: row["pinned"] for row in rows} == {i: ledger.pinned.get(i, False) for i in expected}
    assert not any(ledger.pinned.get(i) for i in ledger.deleted)
    for checkpoint_id in expected:
        assert manager.load_checkpoint(checkpoint_id)["model_state_dict"] == state_of(ledger.saved[checkpoint_id])
    assert_each_flag_has_the_right_holder(rows)
    assert [row["sequence"] for row in rows] == sorted({row["sequence"] for row in rows})
    assert {row["checkpoint_id"] for row in manager.list_trash()} == ledger.deleted
    assert manager.verify_experiment_integrity()["failed"] == 0
    assert os.listdir(tmp_path / "checkpoints" / ".engine" / "staging") == []
    with EnhancedCheckpointManager(manager._tracker, str(tmp_path / "checkpoints")) as fresh:  # and so it is on disk
        assert fresh.list_checkpoints() == manager.list_checkpoints()


def test_threads_that_save_at_once_under_retention_keep_the_newest_and_the_best(
    tracker: ExperimentTracker, tmp_path: Path
) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=3)
    acknowledged: dict[str, int] = {}

    def save(thread: int) -> None:
        for number in range(6):
            epoch = thread * 100 + number + 1
            scores = {"loss": float(abs(epoch - 303)), "metrics": {"f1": float(epoch)}}
            acknowledged[manager.save_checkpoint(state_of(epoch), epoch=epoch, **scores)] = epoch

    with ThreadPoolExecutor(4) as pool:
        for task in [pool.submit(save, thread) for thread in range(4)]:
            task.result(timeout=DEADLINE)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 303
    assert manager.load_checkpoint(checkpoint_type="best_metric")["epoch"] == 306
    acknowledged[manager.save_checkpoint(state_of(5), epoch=5, loss=999.0, metrics={"f1": 0.0})] = 5
    rows = manager.list_checkpoints()
    assert len(rows) == 3  # whatever passes had to skip, the last one made up for
    assert rows[-1]["epoch"] == 5
    assert {row["checkpoint_id"]: row["epoch"] for row in rows}.items() <= acknowledged.items()
    assert_each_flag_has_the_right_holder(rows)


# Processes: one directory, one database, a manager each

CHILD = """
import json, random, sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError

url, folder, experiment, process, seed, rounds = sys.argv[1:]
tracker = ExperimentTracker.resume(experiment, url)
manager = EnhancedCheckpointManager(tracker, folder, max_checkpoints=5)
chance = random.Random(f"{seed}/{process}")
mine = []

def state_of(epoch):
    return {"weight": array("d", [epoch] * 50), "epoch": epoch}

def tell(*words):
    print(json.dumps(words), flush=True)

def is_listed(checkpoint_id):
    return checkpoint_id in [row["checkpoint_id"] for row in manager.list_checkpoints()]

tell("ready")
sys.stdin.readline()
for number in range(int(rounds)):
    action = chance.choices(["save", "load", "named", "list", "pin", "delete"], [8, 2, 3, 2, 1, 2])[0]
    if action == "save" or not mine:
        epoch = int(process) * 1000 + number
        # Those that may be deleted never are the best, so that the best of all that was saved must stay for ever.
        deletable = chance.random() < 0.4
        loss, f1 = chance.randrange(50) + 100 * deletable, chance.randrange(50) - 100 * deletable
        scores = {"loss": loss, "metrics": {"f1": f1}}
        saved = manager.save_checkpoint(state_of(epoch), epoch=epoch, notes="d" if deletable else None, **scores)
        tell("saved", saved, epoch, loss, f1)
        mine.append((saved, epoch, deletable))
        continue
    chosen, epoch, deletable = chance.choice(mine)
    try:
        if action == "load":
            assert manager.load_checkpoint(chosen)["model_state_dict"] == state_of(epoch)
        elif action == "pin":
            manager.pin(chosen)
            assert is_listed(chosen), "a pinned checkpoint is gone"
            manager.unpin(chosen)
        elif action == "delete" and deletable:
            manager.delete_checkpoint(chosen)
            assert not is_listed(chosen), "a deleted checkpoint is still there"
    except CheckpointNotFoundError:
        assert not is_listed(chosen)  # retention of one of the processes was first
    if action == "named":
        kind = chance.choice(["latest", "best_loss", "best_metric"])
        loaded = manager.load_checkpoint(checkpoint_type=kind)  # there always is one, whatever the others do
        assert loaded["model_state_dict"] == state_of(loaded["epoch"])
    elif action == "list":
        rows = manager.list_checkpoints()
        assert rows
        assert all(row["status"] == "committed" for row in rows)
        assert sorted(c for row in rows for c in row["best"]) == ["loss", "metrics.f1"]
tell("done")
"""


@pytest.mark.slow
def test_processes_on_one_directory_under_retention_keep_the_newest_and_the_best_of_all(
    tracker: ExperimentTracker, chance: random.Random, tmp_path: Path
) -> None:
    folder, seed = str(tmp_path / "c"), chance.randrange(2**32)
    url, experiment = tracker.database.database_url, tracker.experiment_id
    with EnhancedCheckpointManager(tracker, folder, max_checkpoints=5) as manager:  # so that there always is a latest
        first = manager.save_checkpoint(state_of(-1), epoch=-1, loss=60, metrics={"f1": -60})
    saved: dict[str, dict[str, float]] = {first: {"epoch": -1, "loss": 60, "f1": -60}}
    last: list[str] = []
    with contextlib.ExitStack() as stack:
        children = []
        for process in range(PROCESSES):
            command = [sys.executable, "-c", CHILD, url, folder, experiment, str(process), str(seed), str(ROUNDS)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            child = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert json.loads(child.stdout.readline()) == ["ready"]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            shown, errors = child.communicate(timeout=DEADLINE)
            assert child.returncode == 0, errors
            assert errors == ""  # no error that was swallowed and logged either
            words = [json.loads(line) for line in shown.splitlines()]
            assert words.pop() == ["done"]
            saved.update({name: {"epoch": epoch, "loss": loss, "f1": f1} for _, name, epoch, loss, f1 in words})
            last += [name for _, name, *_ in words[-1:]]
    assert os.listdir(tmp_path / "c" / ".engine" / "staging") == []
    with EnhancedCheckpointManager(tracker, folder, max_checkpoints=5) as manager:
        rows = manager.list_checkpoints()
        assert rows[-1]["checkpoint_id"] == manager.load_checkpoint()["_checkpoint_metadata"]["checkpoint_id"]
        assert {row["checkpoint_id"] for row in rows} <= set(saved)
        assert_each_flag_has_the_right_holder(rows)
        assert manager.load_checkpoint(checkpoint_type="best_loss")["loss"] == min(s["loss"] for s in saved.values())
        best_metric = manager.load_checkpoint(checkpoint_type="best_metric")["metrics"]["f1"]
        assert best_metric == max(s["f1"] for s in saved.values())
        outcome = manager.verify_experiment_integrity()
        assert (outcome["failed"], outcome["verified"]) == (0, len(rows))
        for row in rows:
            assert manager.load_checkpoint(row["checkpoint_id"])["model_state_dict"] == state_of(row["epoch"])
        newest = manager.save_checkpoint(state_of(7), epoch=7, loss=60, metrics={"f1": -60})
        rows = manager.list_checkpoints()
        assert rows[-1]["checkpoint_id"] == newest
        assert len(rows) == 5  # whatever passes had to skip, this one made up for
    published = sorted(path.parent.name for path in (tmp_path / "c").glob("*/*/checkpoint.json"))
    assert published == sorted(row["checkpoint_id"] for row in rows)
    assert len(last) == PROCESSES


# Races between two calls: a hook is where another thread or process can be put exactly


def at(manager: EnhancedCheckpointManager, event: HookEvent, act: Callable[[str], object]) -> None:
    """Do ``act`` once, with the checkpoint's id, when ``event`` is fired first."""
    left = [act]

    def hook(context: HookContext) -> None:
        if left:
            left.pop()(str(context.checkpoint_id))

    manager.register_hook("race", hook, [event])


def other_manager(manager: EnhancedCheckpointManager) -> EnhancedCheckpointManager:
    """Return a manager as another process would have it: with a database connection of its own."""
    url = manager._db.database_url
    return EnhancedCheckpointManager(None, manager.checkpoint_dir, database_url=url, max_checkpoints=None)


def test_a_pin_that_comes_while_a_deletion_is_asked_for_wins(manager: EnhancedCheckpointManager) -> None:
    saved = manager.save_checkpoint(state_of(1), epoch=1)
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_CHECKPOINT_DELETE, other.pin)
        with pytest.raises(ConfigurationError, match="pinned"):
            manager.delete_checkpoint(saved)
    assert manager.load_checkpoint(saved)["epoch"] == 1
    assert manager.list_trash() == []


def test_a_pin_that_comes_while_retention_asks_wins(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=1)
    pinned = manager.save_checkpoint(state_of(1), epoch=1)
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_CHECKPOINT_DELETE, other.pin)
        newest = manager.save_checkpoint(state_of(2), epoch=2)
    assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [pinned, newest]


def test_a_checkpoint_that_became_the_best_while_retention_asks_stays(
    tracker: ExperimentTracker, tmp_path: Path
) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=2)
    best = manager.save_checkpoint(state_of(1), epoch=1, loss=1.0)
    second = manager.save_checkpoint(state_of(2), epoch=2, loss=2.0)
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_CHECKPOINT_DELETE, lambda _: other.delete_checkpoint(best))
        manager.save_checkpoint(state_of(3), epoch=3, loss=3.0)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["_checkpoint_metadata"]["checkpoint_id"] == second


def test_a_checkpoint_deleted_while_it_is_about_to_be_loaded_is_not_found_and_not_corrupt(
    manager: EnhancedCheckpointManager,
) -> None:
    saved = manager.save_checkpoint(state_of(1), epoch=1)
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_CHECKPOINT_LOAD, other.delete_checkpoint)
        with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint not found"):
            manager.load_checkpoint(saved)
        other.undelete(saved)
    assert manager.list_checkpoints()[0]["status"] == "committed"
    assert manager.list_checkpoints()[0]["verification"] is None


@pytest.mark.parametrize("kind", ["latest", "best_loss", "milestone"])
def test_a_load_by_type_takes_the_next_when_its_checkpoint_is_deleted_meanwhile(
    manager: EnhancedCheckpointManager, kind: str
) -> None:
    for epoch in (1, 2):
        manager.save_checkpoint(state_of(epoch), epoch=epoch, loss=-epoch, checkpoint_type="milestone")
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_CHECKPOINT_LOAD, other.delete_checkpoint)
        assert manager.load_checkpoint(checkpoint_type=kind)["model_state_dict"] == state_of(1)


def before_each_query(
    manager: EnhancedCheckpointManager, patch: pytest.MonkeyPatch, call: Callable[[], Any], meanwhile: Callable[[], Any]
) -> Iterator[Any]:
    """Yield what ``call`` returns with ``meanwhile`` done before its first query, then before its second, and so on."""
    database = manager._db
    made = 0

    def counted(place: int, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == place:
            meanwhile()
        return type(database).query(database, *arguments)

    place = 0
    while made >= place:
        place, made = place + 1, 0
        patch.setattr(database, "query", partial(counted, place))
        yield call()


def test_a_listing_shows_one_moment_whatever_is_saved_while_it_is_read(
    manager: EnhancedCheckpointManager, tracker: ExperimentTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, experiment = iter(range(1000, 0, -1)), tracker.experiment_id

    def improve() -> None:
        loss = next(losses)
        other.save_checkpoint(state_of(loss), epoch=loss, loss=loss, metrics={"f1": -loss}, experiment_id=experiment)

    with other_manager(manager) as other:
        improve()
        for rows in before_each_query(manager, monkeypatch, manager.list_checkpoints, improve):
            assert_each_flag_has_the_right_holder(rows)
    assert next(losses) < 998, "nothing was saved meanwhile: nothing was tried"


@pytest.mark.parametrize("kind", ["latest", "best_loss", "milestone"])
def test_a_load_by_type_finds_one_whenever_the_chosen_one_is_deleted(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for epoch in range(30):
        manager.save_checkpoint(state_of(epoch), epoch=epoch, loss=-epoch, checkpoint_type="milestone")
    monkeypatch.setattr("model_checkpoint.checkpoint.removal._PATIENCE", 0.01)
    deleted = []

    def delete_newest() -> None:
        doomed = other.list_checkpoints()[-1]["checkpoint_id"]
        with contextlib.suppress(LockTimeoutError):  # while it is read, it stays
            other.delete_checkpoint(doomed)
            deleted.append(doomed)

    with other_manager(manager) as other:
        load = lambda: manager.load_checkpoint(checkpoint_type=kind)  # noqa: E731
        for loaded in before_each_query(manager, monkeypatch, load, delete_newest):
            assert loaded["model_state_dict"] == state_of(loaded["epoch"])
    assert len(deleted) > 1, "nothing was deleted meanwhile: nothing was tried"


def test_verification_goes_on_when_a_checkpoint_is_deleted_meanwhile(manager: EnhancedCheckpointManager) -> None:
    doomed, *others = [manager.save_checkpoint(state_of(epoch), epoch=epoch) for epoch in range(3)]
    with other_manager(manager) as other:
        at(manager, HookEvent.BEFORE_INTEGRITY_CHECK, lambda _: other.delete_checkpoint(doomed))
        outcome = manager.verify_experiment_integrity()
    assert (outcome["failed"], list(outcome["checkpoint_results"])) == (0, others)


@pytest.mark.parametrize("reading", ["load", "verify"])
def test_nothing_is_removed_while_it_is_read(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    saved = manager.save_checkpoint(state_of(1), epoch=1)
    monkeypatch.setattr("model_checkpoint.checkpoint.removal._PATIENCE", 0.05)
    refused = []
    with other_manager(manager) as other:

        def delete_meanwhile(*_: object) -> None:
            with pytest.raises(LockTimeoutError):
                other.delete_checkpoint(saved)
            refused.append(True)

        if reading == "verify":
            assert manager.verify_experiment_integrity(on_bytes=delete_meanwhile)["verified"] == 1
        else:
            read = SafeTensorsBackend.read
            monkeypatch.setattr(SafeTensorsBackend, "read", lambda *told: (delete_meanwhile(), read(*told))[1])
            assert manager.load_checkpoint(saved)["model_state_dict"] == state_of(1)
        assert refused
        assert other.delete_checkpoint(saved)


def test_of_two_deletions_of_one_checkpoint_neither_does_harm(manager: EnhancedCheckpointManager) -> None:
    kept, doomed = (manager.save_checkpoint(state_of(epoch), epoch=epoch, loss=-epoch) for epoch in (1, 2))
    with other_manager(manager) as other:
        at(
            manager,
            HookEvent.BEFORE_CHECKPOINT_DELETE,
            lambda _: (other.delete_checkpoint(doomed), other.empty_trash()),
        )
        with contextlib.suppress(CheckpointNotFoundError):
            manager.delete_checkpoint(doomed)
    assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [kept]
    assert manager.list_trash() == []
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 1


def test_a_pin_of_what_was_just_deleted_is_refused(manager: EnhancedCheckpointManager) -> None:
    saved = manager.save_checkpoint(state_of(1), epoch=1)
    look_up = manager._record
    with other_manager(manager) as other:

        def delete_after_look_up(checkpoint_id: str) -> Any:
            record = look_up(checkpoint_id)
            other.delete_checkpoint(checkpoint_id)
            return record

        manager._record = delete_after_look_up  # type: ignore[method-assign]
        with pytest.raises(CheckpointNotFoundError):
            manager.pin(saved)
    assert manager.list_checkpoints() == []


def test_a_re_election_keeps_the_earlier_commit_of_a_tie_though_the_clock_jumped_back(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time
    saved = []
    for epoch, (jump, loss) in enumerate([(0, 1.0), (-1e8, 1.0), (1e8, 0.0)]):
        monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)
        saved.append(manager.save_checkpoint(state_of(epoch), epoch=epoch, loss=loss))
    manager.delete_checkpoint(saved[2])
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 0
    manager.delete_checkpoint(saved[0])
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 1


def test_retention_that_cannot_have_the_lock_is_made_up_for_by_the_next_save(
    tracker: ExperimentTracker, tmp_path: Path
) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=2)
    with open(tmp_path / "c" / ".engine" / "gc.lock") as lock:  # as a save of another process holds it
        fcntl.flock(lock, fcntl.LOCK_SH)
        for epoch in range(4):
            manager.save_checkpoint(state_of(epoch), epoch=epoch)
        assert [row["epoch"] for row in manager.list_checkpoints()] == [0, 1, 2, 3]
    manager.save_checkpoint(state_of(4), epoch=4)
    assert [row["epoch"] for row in manager.list_checkpoints()] == [0, 4]
