"""kill -9 at random moments: nothing acknowledged is lost, nothing partial is ever visible.

The oracle lives outside the store: a child writes each id to a pipe after the call that acknowledged it has returned.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

RUNS = 100

CHILD = """
import sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

folder, experiment, mode, seed = sys.argv[1:]
tracker = ExperimentTracker.resume(experiment, f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(
    tracker,
    folder + "/checkpoints",
    max_checkpoints=3 if mode == "retain" else None,
    enable_compression=mode == "compress",
)
print("ready", flush=True)
epoch, mine = int(seed) * 1000, []
while True:
    epoch += 1
    state = {"epoch": epoch, "weights": array("d", [epoch]) * 20_000}
    mine.append(manager.save_checkpoint(state, {"m": array("f", [epoch] * 99)}, epoch=epoch, loss=1 / epoch))
    print("saved", mine[-1], epoch, flush=True)
    if mode == "delete" and len(mine) > 2:
        print("deleting", mine[0], flush=True)
        manager.delete_checkpoint(mine[0])
        print("deleted", mine.pop(0), flush=True)
"""


def run_and_kill(folder: Path, experiment: str, mode: str, seed: int, wait: float) -> list[list[str]]:
    """Kill the child ``wait`` seconds after it is ready (for mode ``open``: after its start); returns its words."""
    command = [sys.executable, "-c", CHILD, str(folder), experiment, mode, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}) as child:
        assert child.stdout is not None
        if mode != "open":
            assert child.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + wait
        said = b""
        while (left := deadline - time.monotonic()) > 0:  # drains the pipe meanwhile, so that the child never blocks
            if select.select([child.stdout], [], [], left)[0]:
                part = os.read(child.stdout.fileno(), 1 << 16)
                assert part, "the child ended by itself"
                said += part
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    whole = said[: said.rfind(b"\n") + 1].decode()  # the last line may be cut off: it acknowledged nothing yet
    return [line.split() for line in whole.splitlines() if line != "ready"]


@pytest.mark.slow
def test_100_kills_lose_no_acknowledged_checkpoint_and_show_no_partial_one(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    url = f"sqlite:///{tmp_path}/e.db"
    with ExperimentTracker("crash", database_url=url) as tracker:
        experiment = tracker.experiment_id
    expected: dict[str, int] = {}  # what must be there, id -> epoch
    unsure: set[str] = set()  # whose deletion had begun when the child was killed
    saved = 0
    for run in range(RUNS):
        mode = chance.choice(["save", "save", "compress", "delete", "open", "retain"])
        wait = chance.uniform(0.0, 0.25) if mode == "open" else chance.uniform(0.0, 0.06)
        words = run_and_kill(tmp_path, experiment, mode, run, wait)
        mine = {words_[1]: int(words_[2]) for words_ in words if words_[0] == "saved"}
        saved += len(mine)
        unsure |= {id for verb, id, *_ in words if verb == "deleting"}
        deleted = {id for verb, id, *_ in words if verb == "deleted"}
        if mode == "retain":  # a later save that was never acknowledged may have removed any, but is then itself there
            unsure |= {*expected, *mine}
        expected.update(mine)
        with EnhancedCheckpointManager(None, str(tmp_path / "checkpoints"), database_url=url) as manager:
            rows = {row["checkpoint_id"]: row for row in manager.list_checkpoints(experiment)}
            assert not deleted & rows.keys(), "a deleted checkpoint came back"
            assert expected.keys() - unsure - deleted <= rows.keys(), "an acknowledged checkpoint is gone"
            assert not mine or max(row["epoch"] for row in rows.values()) >= max(mine.values())
            check_visible(manager, tmp_path / "checkpoints", rows, experiment, words)
            expected = {id: row["epoch"] for id, row in rows.items()}
            unsure = set()
    print(f"{saved} acknowledged saves over {RUNS} kills")
    assert saved > RUNS
    with EnhancedCheckpointManager(None, str(tmp_path / "checkpoints"), database_url=url) as manager:
        report = manager.verify_experiment_integrity(experiment)
        assert (report["failed"], report["verified"]) == (0, len(expected))


def check_visible(
    manager: EnhancedCheckpointManager, folder: Path, rows: dict[str, dict], experiment: str, words: list[list[str]]
) -> None:
    """Check that what is listed is what lies on disk, whole, with one best holder; the newest ones byte for byte."""
    published = {path.name for path in folder.glob("*/*") if path.parent.name != ".engine"}
    assert published == rows.keys(), "a partial or forgotten checkpoint is visible"
    assert os.listdir(folder / ".engine" / "staging") == []
    if not rows:
        return
    assert [id for id, row in rows.items() if row["is_best_loss"]] == [max(rows, key=lambda id: rows[id]["epoch"])]
    newest = [id for verb, id, *_ in words if verb == "saved" and id in rows]
    for id in {*newest, list(rows)[-1]}:
        state = manager.load_checkpoint(id)
        epoch = rows[id]["epoch"]
        assert state["model_state_dict"]["epoch"] == epoch
        assert set(state["model_state_dict"]["weights"]) == {float(epoch)}
    if newest:
        latest = manager.load_checkpoint(experiment_id=experiment)
        assert latest["epoch"] >= rows[newest[-1]]["epoch"]
