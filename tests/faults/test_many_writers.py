"""Row 9: 16 writers and 8 readers on one database, a writer killed every second; nothing is lost or doubled."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker
from tests.servers import KINDS, new_database

ROOT = Path(__file__).parents[2]
DEADLINE = 120.0  # seconds that anything may take before it counts as hung

WRITER = """
import sys
from model_checkpoint import ExperimentTracker
run = ExperimentTracker.resume(sys.argv[2], sys.argv[1])
name, count = "writer-" + sys.argv[3], 0
for line in sys.stdin:
    for _ in range(50):
        run.log_metrics({name: float(count), "shared": 1.0}, step=count)
        count += 1
    run.flush()
    print(count, flush=True)
run.close()
"""

READER = """
import sys
from model_checkpoint import ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
database = EnhancedDatabaseConnection(sys.argv[1])
seen, looks = {}, 0
print("ready", flush=True)
while not sys.stdin.closed:
    points, looks = {}, looks + 1
    for name, value, step, at in database.metrics.points(sys.argv[2]):
        points.setdefault(name, []).append(value)
    for name, values in points.items():
        if name != "shared":
            assert values == [float(i) for i in range(len(values))], name
        assert len(values) >= seen.get(name, 0), name
        seen[name] = len(values)
    print("go on?", flush=True)
    if not sys.stdin.readline().strip():
        break
print(looks, flush=True)
"""


class Child:
    """A process that answers lines with lines; its last answer is what it has acknowledged."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.acknowledged = 0
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._talk)
        self.thread.start()

    def _talk(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            while not self.ending.is_set():
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
                if not answer:
                    return
                self.acknowledged = int(answer) if answer.strip().isdigit() else self.acknowledged
            self.process.stdin.close()
        except BrokenPipeError:
            return  # it was killed

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)
        self.thread.join(DEADLINE)

    def end(self) -> None:
        self.ending.set()
        self.thread.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.wait(DEADLINE)
        assert self.process.returncode == 0, self.process.stderr.read()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writers_lose_nothing_that_was_acknowledged(
    kind: str,
    tmp_path: Path,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    with new_database(kind, tmp_path) as url:
        run = ExperimentTracker("shared", database_url=url)
        names = map(str, count(1))
        writers = {name: Child(WRITER, url, run.experiment_id, name) for name in islice(names, 16)}
        readers = [Child(READER, url, run.experiment_id) for _ in range(8)]
        acknowledged: dict[str, int] = {}
        killed = 0
        deadline = time.monotonic() + effort(6, 60)
        while time.monotonic() < deadline:
            threading.Event().wait(1.0)  # the pace of the kills, which is what the row asks for
            name = chance.choice(list(writers))
            child = writers.pop(name)
            child.kill()
            acknowledged[name] = child.acknowledged
            killed += 1
            new = next(names)
            writers[new] = Child(WRITER, url, run.experiment_id, new)
        for child in [*writers.values(), *readers]:
            child.ending.set()
        for name, child in writers.items():
            child.end()
            acknowledged[name] = child.acknowledged
        for child in readers:
            child.end()
        total = 0
        for name, least in acknowledged.items():
            values = [point["metric_value"] for point in run.get_metrics(f"writer-{name}")]
            assert values == [float(i) for i in range(len(values))]
            assert len(values) >= least, name
            total += len(values)
        assert len(run.get_metrics("shared")) == total
        assert run.database.experiments.position(run.experiment_id) == 2 * total
        assert total > 50 * killed
        assert all(reader.process.returncode == 0 for reader in readers)
        run.close()
    tried(killed)
