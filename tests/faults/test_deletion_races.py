"""Deletion against saves and loads of other processes, which are stopped, continued and killed at random meanwhile.

Two things may never happen: a listed checkpoint that does not load although nobody deletes it, and the loss of one that
was acknowledged. The oracle is what the processes said before and after each call; what was said survives a SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common import DEADLINE, PRELUDE, ROOT

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

Effort = Callable[[int, int], int]
Tried = Callable[[int], None]

# Each works until it is told to stop or is killed. ``ids`` come from the parent, which hears of every save.
COMMON = """
import contextlib, random, threading
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, LockTimeoutError

role, folder, url, experiment, seed = sys.argv[1:]
chance = random.Random(seed)
tracker = ExperimentTracker.resume(experiment, url)
manager = EnhancedCheckpointManager(tracker, folder, max_checkpoints=4 if role == "retain" else None)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()

def state_of(epoch):
    return {"epoch": epoch, "weight": array("d", [epoch]) * 2000}

def check(loaded):
    model = loaded["model_state_dict"]
    assert model == state_of(loaded["epoch"]) and model["epoch"] == loaded["epoch"], "a mixture"
    return loaded

def save():
    epoch = chance.randrange(10**9)
    optimizer, loss = {"m": array("f", [epoch]) * 500}, chance.random()
    saved = manager.save_checkpoint(state_of(epoch), optimizer, epoch=epoch, loss=loss)
    tell("saved", saved, epoch)
    return saved

def listed():
    return [row["checkpoint_id"] for row in manager.list_checkpoints()]

def load(checkpoint_id):
    "What is listed loads, or has been deleted since."
    try:
        check(manager.load_checkpoint(checkpoint_id))
    except CheckpointNotFoundError:
        tell("missed", checkpoint_id)
        assert checkpoint_id not in listed(), f"{checkpoint_id} is listed and not found"

tell("ready")
"""
ROLES = {
    # Saves, and loads what it just saved.
    "save": """
while not stop.wait(chance.uniform(0, 0.05)):
    saved = save()
    if chance.random() < 0.3:
        load(saved)
""",
    # The same under a retention policy, in an experiment of its own: the newest must stay.
    "retain": """
while not stop.is_set():
    saved = save()
    rows = listed()
    assert saved in rows, "the newest is gone"
    for checkpoint_id in rows:
        load(checkpoint_id)
    check(manager.load_checkpoint(checkpoint_type="best_loss"))
""",
    "load": """
while not stop.is_set():
    for checkpoint_id in listed()[-30:]:
        load(checkpoint_id)
        if stop.wait(chance.uniform(0, 0.02)):  # leaves the deletions a gap now and then
            break
    for kind in ("latest", "best_loss"):
        try:
            check(manager.load_checkpoint(checkpoint_type=kind))
        except CheckpointNotFoundError:
            tell("missed", kind)
    if chance.random() < 0.3:
        outcome = manager.verify_experiment_integrity()
        assert outcome["failed"] == 0, outcome
""",
    # Deletes at random, empties the trash, and sometimes changes its mind.
    "delete": """
while not stop.is_set():
    rows = listed()
    if len(rows) > 6:
        doomed = chance.choice(rows[:-2])
        tell("deleting", doomed)
        try:
            manager.delete_checkpoint(doomed)
            tell("deleted", doomed)
        except LockTimeoutError:  # a process that was stopped holds the lock
            tell("kept", doomed)
            continue
        except CheckpointNotFoundError:  # another one was first
            continue
        except ConfigurationError:  # it was brought back, which pins it
            tell("kept", doomed)
            continue
        if chance.random() < 0.2:
            tell("undeleting", doomed)
            try:
                manager.undelete(doomed)
                tell("undeleted", doomed)
            except (CheckpointNotFoundError, LockTimeoutError):  # the trash was emptied meanwhile
                tell("purged", doomed)
    if chance.random() < 0.3:
        with contextlib.suppress(LockTimeoutError):
            manager.empty_trash()
""",
}
WORDS = ["saved", "missed", "deleted", "kept", "undeleted", "purged"]
STAFF = ["save", "save", "retain", "load", "load", "delete", "delete"]


class Process:
    """One of the processes, with all that it said so far."""

    def __init__(self, role: str, folder: Path, url: str, experiment: str, seed: int) -> None:
        program = PRELUDE + COMMON + ROLES[role] + '\ntell("done")\n'
        command = [sys.executable, "-c", program, role, str(folder), url, experiment, str(seed)]
        self.role = role
        self.killed = False
        self.said: list[list[Any]] = []
        self.errors = ""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.child = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self._readers = [threading.Thread(target=self._listen), threading.Thread(target=self._complain)]
        for reader in self._readers:
            reader.start()

    def _listen(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.endswith("\n"):  # what a kill cut off said nothing
                self.said.append(json.loads(line))

    def _complain(self) -> None:
        assert self.child.stderr is not None
        self.errors = self.child.stderr.read()

    def running(self) -> bool:
        return self.child.poll() is None

    def kill(self) -> None:
        self.killed = True
        self.child.kill()
        self.wait()

    def stop(self) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.wait()

    def wait(self) -> None:
        try:
            self.child.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise
        finally:
            for reader in self._readers:
                reader.join(timeout=DEADLINE)

    def ids(self, word: str) -> set[str]:
        return {words[1] for words in self.said if words[0] == word}


@contextlib.contextmanager
def gone_at_the_end(processes: list[Process]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.running():
                process.kill()


def disturb(processes: list[Process], hire: Callable[[str], Process], chance: random.Random, seconds: float) -> int:
    """Stop, continue and kill at random; who was killed is replaced. Returns how often."""
    deadline, count = time.monotonic() + seconds, 0
    pause = threading.Event()  # never set: it is the clock by which the processes are disturbed
    while time.monotonic() < deadline:
        pause.wait(chance.uniform(0.01, 0.08))
        victims = [process for process in processes if process.running()]
        victim = chance.choice(victims)
        count += 1
        if chance.random() < 0.7:
            os.kill(victim.child.pid, signal.SIGSTOP)
            pause.wait(chance.uniform(0.01, 0.3))
            if chance.random() < 0.3:
                victim.kill()  # while it stands still in the middle of something
            else:
                os.kill(victim.child.pid, signal.SIGCONT)
        else:
            victim.kill()
        if victim.killed:
            processes.append(hire(victim.role))
    return count


@pytest.mark.slow
def test_deletions_never_leave_a_reference_to_missing_data(
    tmp_path: Path, chance: random.Random, effort: Effort, tried: Tried
) -> None:
    folder, url = tmp_path / "checkpoints", f"sqlite:///{tmp_path}/experiments.db"
    experiments = {}
    for role in ("shared", "retained"):
        with ExperimentTracker(role, database_url=url) as tracker:
            experiments[role] = tracker.experiment_id

    def hire(role: str) -> Process:
        experiment = experiments["retained" if role == "retain" else "shared"]
        return Process(role, folder, url, experiment, chance.randrange(2**32))

    processes: list[Process] = []
    with gone_at_the_end(processes):
        processes += [hire(role) for role in STAFF]
        disturbed = disturb(processes, hire, chance, effort(8, 120))
        for process in processes:
            if process.running():
                process.stop()
    complaints = [f"{process.role}: {process.errors}" for process in processes if process.errors.strip()]
    assert complaints == []
    assert [process.role for process in processes if not process.killed and process.said[-1] != ["done"]] == []
    saved = {words[1]: words[2] for process in processes for words in process.said if words[0] == "saved"}
    tried(disturbed + len(saved))
    counts = {word: sum(len(process.ids(word)) for process in processes) for word in WORDS}
    print(f"{disturbed} disturbances, {sum(p.killed for p in processes)} kills, {counts}")
    assert any(process.killed for process in processes)
    assert any(process.ids("deleted") for process in processes), "nothing was deleted: nothing was tried"
    check_the_end(folder, url, experiments, processes, saved)


def check_the_end(
    folder: Path, url: str, experiments: dict[str, str], processes: list[Process], saved: dict[str, int]
) -> None:
    doomed = set().union(*(process.ids("deleting") for process in processes))
    retained = set().union(*(process.ids("saved") for process in processes if process.role == "retain"))
    with EnhancedCheckpointManager(None, str(folder), database_url=url, max_checkpoints=None) as manager:
        rows = {row["checkpoint_id"]: row for row in manager.list_checkpoints()}
        lost = saved.keys() - doomed - retained - rows.keys()
        assert lost == set(), "acknowledged, never deleted, and gone"
        assert [row["status"] for row in rows.values() if row["status"] != "committed"] == []
        for checkpoint_id, row in rows.items():
            loaded = manager.load_checkpoint(checkpoint_id)
            assert loaded["model_state_dict"]["epoch"] == row["epoch"] == saved.get(checkpoint_id, row["epoch"])
            assert set(loaded["model_state_dict"]["weight"]) == {float(row["epoch"])}
        assert manager.verify_experiment_integrity()["failed"] == 0
        published = {path.name for path in folder.glob("*/*") if path.parent.name != ".engine"}
        assert published == rows.keys(), "a folder without a row, or a row without a folder"
        assert os.listdir(folder / ".engine" / "staging") == []
        assert {row["checkpoint_id"] for row in manager.list_trash()} == set(os.listdir(folder / ".engine" / "trash"))
        for experiment in experiments.values():
            mine = [row for row in rows.values() if row["experiment_id"] == experiment]
            assert [row["is_best_loss"] for row in mine].count(True) == 1
            assert min(mine, key=lambda row: row["loss"])["is_best_loss"]
        mine = {row["checkpoint_id"] for row in rows.values() if row["experiment_id"] == experiments["retained"]}
        words = [words for process in processes if process.role == "retain" for words in process.said]
        assert [words[1] for words in words if words[0] == "saved"][-1] in mine, "the newest that retention knew of"


READER = """
from model_checkpoint import EnhancedCheckpointManager
folder, url, checkpoint_id = sys.argv[1:]
with EnhancedCheckpointManager(None, folder, database_url=url) as manager:
    tell("ready")
    while True:
        manager.load_checkpoint(checkpoint_id)
"""


@pytest.mark.slow
def test_a_deletion_gets_its_turn_however_busy_the_readers_are(
    tracker: ExperimentTracker, tmp_path: Path, effort: Effort, tried: Tried
) -> None:
    """Readers share the lock, and with a few of them it is never free: retention would never run, the disk fill up."""
    folder, url, rounds = tmp_path / "checkpoints", tracker.database.database_url, effort(2, 20)
    with EnhancedCheckpointManager(tracker, str(folder), max_checkpoints=None) as manager:
        read = manager.save_checkpoint({"w": bytes(2_000_000)})
        doomed = [manager.save_checkpoint({"w": bytes(10)}) for _ in range(rounds)]
        readers: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(4):
                command = [sys.executable, "-c", PRELUDE + READER, str(folder), url, read]
                readers.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE))
            for reader in readers:
                assert reader.stdout is not None
                assert reader.stdout.readline() == b'["ready"]\n'
            for checkpoint_id in doomed:
                manager.delete_checkpoint(checkpoint_id)  # which gives up after ten seconds
            assert [reader.poll() for reader in readers] == [None] * len(readers), "nobody read"
        finally:
            for reader in readers:
                reader.kill()
                reader.communicate()
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [read]
    tried(rounds)
