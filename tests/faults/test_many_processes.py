"""Managers on one directory from many processes, each used by many threads: saving, loading, pinning and the rest.

Unlike the short forms with fixed counts, this goes on for a time, and every thread works with the checkpoints of all
others. The oracle is what each was told, written down before and after the call.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import DEADLINE, PRELUDE, ROOT

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

Effort = Callable[[int, int], int]
Tried = Callable[[int], None]

PROCESSES, THREADS = 4, 4

CHILD = """
import contextlib, random, threading, time
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, LockTimeoutError

folder, url, experiment, process, seed, seconds, threads = sys.argv[1:]
tracker = ExperimentTracker.resume(experiment, url)
manager = EnhancedCheckpointManager(tracker, folder, max_checkpoints=None)
lock = threading.Lock()
mine = {}  # of this process: id -> (epoch, its own thread), without those whose deletion has begun
pinned = set()

def say(*words):
    with lock:
        tell(*words)

def state_of(epoch):
    return {"epoch": epoch, "weight": array("d", [epoch]) * 500}

def check(loaded):
    assert loaded["model_state_dict"] == state_of(loaded["epoch"]), "a mixture"
    return loaded

def work(thread, chance, until):
    number = 0
    while time.monotonic() < until:
        number += 1
        actions = ["save", "own", "any", "named", "list", "pin", "delete", "verify"]
        action = chance.choices(actions, [8, 4, 4, 3, 2, 3, 2, 0.2])[0]
        with lock:
            own = chance.choice(list(mine)) if mine else None
        if action == "save" or own is None:
            epoch = int(process) * 10**8 + thread * 10**6 + number
            loss, f1 = chance.randrange(1000), chance.randrange(1000)  # so few that many tie
            saved = manager.save_checkpoint(state_of(epoch), epoch=epoch, loss=loss, metrics={"f1": f1})
            say("saved", saved, epoch, loss, f1)
            with lock:
                mine[saved] = (epoch, thread)
        elif action == "own":
            with lock:
                alive = dict(mine)
            if own in alive:
                try:
                    assert check(manager.load_checkpoint(own))["epoch"] == alive[own][0]
                except CheckpointNotFoundError:
                    with lock:
                        assert own not in mine, "acknowledged, not deleted, and not found"
        elif action == "any":
            rows = manager.list_checkpoints()
            row = chance.choice(rows)
            with contextlib.suppress(CheckpointNotFoundError):  # one that is listed may be deleted meanwhile
                assert check(manager.load_checkpoint(row["checkpoint_id"]))["epoch"] == row["epoch"]
        elif action == "named":
            check(manager.load_checkpoint(checkpoint_type=chance.choice(["latest", "best_loss", "best:f1"])))
        elif action == "list":
            with lock:
                before = set(mine)
            rows = manager.list_checkpoints()
            listed = [row["checkpoint_id"] for row in rows]
            with lock:
                after = set(mine)
            assert before & after <= set(listed), "acknowledged, not deleted, and not listed"
            assert len(set(listed)) == len(listed)
            assert [row["sequence"] for row in rows] == sorted(row["sequence"] for row in rows)
            assert {row["status"] for row in rows} <= {"committed"}
            assert sorted(c for row in rows for c in row["best"]) == ["loss", "metrics.f1"]
        elif action == "pin":
            with lock:
                possible = [i for i, (_, owner) in mine.items() if owner == thread]  # so that its word is the last one
            if possible:
                chosen = chance.choice(possible)
                with contextlib.suppress(CheckpointNotFoundError):
                    (manager.unpin if chosen in pinned else manager.pin)(chosen)
                    with lock:
                        pinned.symmetric_difference_update({chosen})
                    say("pinned" if chosen in pinned else "unpinned", chosen)
        elif action == "delete":
            with lock:
                doomed = mine.pop(own, None)
            if doomed is None:
                continue
            say("deleting", own)
            try:
                manager.delete_checkpoint(own)
                say("deleted", own)
            except ConfigurationError as refusal:
                assert "is pinned" in str(refusal), refusal
                say("kept", own)
                with lock:
                    mine[own] = doomed
            except LockTimeoutError:  # everybody else kept it busy: nothing was done
                say("kept", own)
                with lock:
                    mine[own] = doomed
        else:
            outcome = manager.verify_experiment_integrity()
            assert outcome["failed"] == 0, outcome

def guarded(*arguments):
    try:
        work(*arguments)
    except BaseException as error:
        import traceback
        say("error", "".join(traceback.format_exception(error)))

say("ready")
sys.stdin.readline()
until = time.monotonic() + float(seconds)
workers = [
    threading.Thread(target=guarded, args=(thread, random.Random(f"{seed}/{process}/{thread}"), until))
    for thread in range(int(threads))
]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
say("done")
"""


@pytest.mark.slow
def test_threads_of_many_processes_lose_nothing_and_leave_each_flag_with_the_best(
    tracker: ExperimentTracker, tmp_path: Path, chance: random.Random, effort: Effort, tried: Tried
) -> None:
    folder, url, seed, seconds = (
        tmp_path / "checkpoints",
        tracker.database.database_url,
        chance.random(),
        effort(10, 60),
    )
    with EnhancedCheckpointManager(tracker, str(folder), max_checkpoints=None) as manager:
        # The first one stays, so that there always are a latest, a best and something to list.
        first = manager.save_checkpoint(first_state(), epoch=0, loss=1000, metrics={"f1": -1})
        manager.pin(first)
    said: list[list[Any]] = []
    with contextlib.ExitStack() as stack:
        children = []
        for process in range(PROCESSES):
            arguments = [folder, url, tracker.experiment_id, process, seed, seconds, THREADS]
            command = [sys.executable, "-c", PRELUDE + CHILD, *map(str, arguments)]
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
            shown, errors = child.communicate(timeout=seconds + DEADLINE)
            assert (child.returncode, errors) == (0, "")  # nor any error that was only logged
            said += map(json.loads, shown.splitlines())
    assert [words[1] for words in said if words[0] == "error"] == []
    assert sum(words == ["done"] for words in said) == PROCESSES
    saved = {words[1]: words[2:] for words in said if words[0] == "saved"}
    deleted = {words[1] for words in said if words[0] == "deleted"}
    pins = {words[1]: words[0] == "pinned" for words in said if words[0] in ("pinned", "unpinned")}
    print({word: sum(words[0] == word for words in said) for word in ("saved", "deleted", "kept", "pinned")})
    tried(len(said))
    assert deleted, "nothing was deleted: nothing was tried"
    with EnhancedCheckpointManager(tracker, str(folder), max_checkpoints=None) as manager:
        rows = manager.list_checkpoints()
        assert {row["checkpoint_id"] for row in rows} == {first, *saved} - deleted
        for row in rows:
            loaded = manager.load_checkpoint(row["checkpoint_id"])
            epoch, loss, f1 = saved.get(row["checkpoint_id"], [0, 1000, -1])
            assert (loaded["epoch"], loaded["loss"], loaded["metrics"]) == (epoch, loss, {"f1": f1})
            assert loaded["model_state_dict"]["epoch"] == epoch
            assert set(loaded["model_state_dict"]["weight"]) == {float(epoch)}
            assert row["pinned"] == pins.get(row["checkpoint_id"], row["checkpoint_id"] == first)
        holders = {c: row["checkpoint_id"] for row in rows for c in row["best"]}
        assert sum(len(row["best"]) for row in rows) == 2, "each flag has one holder"
        # Of those that tie the earliest: min and max keep the first, and rows are in the order of the saves.
        assert holders["loss"] == min(rows, key=lambda row: row["loss"])["checkpoint_id"]
        assert holders["metrics.f1"] == max(rows, key=lambda row: row["metrics"]["f1"])["checkpoint_id"]
        assert manager.verify_experiment_integrity()["failed"] == 0
        assert {row["checkpoint_id"] for row in manager.list_trash()} == deleted
    assert os.listdir(folder / ".engine" / "staging") == []
    published = {path.name for path in folder.glob("*/*") if path.parent.name != ".engine"}
    assert published == {first, *saved} - deleted


def first_state() -> dict[str, Any]:
    return {"epoch": 0, "weight": array("d", [0]) * 500}
