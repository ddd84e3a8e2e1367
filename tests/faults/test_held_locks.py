"""Row 9 once more: others keep the database locked, and the training is killed meanwhile; what it logged is there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from tests.servers import KINDS, new_database

ROOT = Path(__file__).parents[2]
LOST = 2.0  # seconds before the kill; half a second of buffer, half of waiting, and a machine that has other work

TRAINING = """
import sys, time
from itertools import count
from model_checkpoint import ExperimentTracker
run = ExperimentTracker.resume(sys.argv[2], sys.argv[1])
for i in count(int(sys.argv[3])):
    run.log_metric("ab"[i % 2], float(i))
    if i % 20 == 0:
        print(i, time.monotonic(), flush=True)
        time.sleep(0.01)
"""


def kill_amid_locks(url: str, experiment_id: str, first: int, chance: random.Random) -> tuple[int, list[float]]:
    """Return what was logged well before the kill, and what is stored."""
    blocker = EnhancedDatabaseConnection(url)
    command = [sys.executable, "-c", TRAINING, url, experiment_id, str(first)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        told = [training.stdout.readline()]
        for seconds in (chance.choice([0.1, 0.5, 0.9, 1.4, 2.2]), chance.choice([0.3, 0.6, 1.2]), 2 * LOST):
            with blocker.transaction() as connection:
                connection.execute("UPDATE experiments SET points = points WHERE id = :id", {"id": experiment_id})
                time.sleep(seconds)  # what others do with a lock
                if seconds == 2 * LOST:
                    training.kill()
                    killed = time.monotonic()
            time.sleep(chance.uniform(0.0, 0.05))
        told += training.stdout.read().splitlines()
    blocker.close()
    logged = [line.split() for line in told if len(line.split()) == 2]
    acknowledged = [int(number) for number, at in logged if killed - float(at) > LOST]
    with ExperimentTracker.resume(experiment_id, url) as again:
        stored = [point["metric_value"] for point in again.get_metrics()]
    return max(acknowledged, default=0), stored


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_while_others_hold_a_lock_survives_a_kill_in_order_and_once(
    tmp_path: Path,
    kind: str,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
    chance: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with new_database(kind, tmp_path) as url:
        run = ExperimentTracker("run", database_url=url)
        run.close()
        stored: list[float] = []
        for _ in range(effort(2, 12)):
            acknowledged, stored = kill_amid_locks(url, run.experiment_id, len(stored), chance)
            assert stored == [float(i) for i in range(len(stored))]
            assert len(stored) > acknowledged > 0
            tried(1)
