"""What does tracking cost, and how fast can it be asked?

Every peer logs the same values in the same run, in another order each round; what counts is the time until everything
is stored, final flush included. The databases on servers are those that the tests use (``tests/servers.py``).

    python benchmarks/track.py [--rounds 5] [--folder /mnt/disk] [--check]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from report import Figure, Section, machine, progress, shuffled, tell
from track_peers import PEERS, measure

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_checkpoint import ExperimentTracker, Queries
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.columns import Columns
from model_checkpoint.database.models import ExperimentRecord
from tests.servers import new_database

PACKAGES = ("model-checkpoint", "mlflow", "trackio", "aim", "wandb", "tensorboardX", "sqlalchemy", "psycopg", "pymysql")
BULK = 2_000_000  # points of a bulk


def calls(rounds: int, folder: Path) -> Section:
    """Return microseconds a point when each is a call of its own, until all are stored."""
    return _peers(Section("one call a point, until stored", unit="us"), "calls", rounds, folder)


def ten_values(rounds: int, folder: Path) -> Section:
    """Return the microseconds that one call with ten values keeps the training thread; the median of its calls."""
    section = Section("a call of log_metrics with 10 values, in the thread that calls", unit="us")
    return _peers(section, "ten", rounds, folder)


def _peers(section: Section, what: str, rounds: int, folder: Path) -> Section:
    for i in range(rounds + 1):
        for name in shuffled(list(PEERS), i):
            progress(f"{what}: round {i} of {rounds}, {name}")
            section.add(name, measure(what, name, _own_folder(folder)))
    return section


def _own_folder(folder: Path) -> Path:
    """Return a new folder, which stays until the end: processes that some peers leave behind go on after their run."""
    return Path(tempfile.mkdtemp(dir=folder))


def bulk(rounds: int, folder: Path) -> Section:
    """Return microseconds a point of log_arrays on each database, until all are stored."""
    section = Section(f"bulk of {BULK:,} points, until stored", unit="us")
    values, steps = np.random.default_rng(0).normal(size=BULK), np.arange(BULK)
    for i in range(rounds + 1):
        for kind in shuffled(["sqlite", "postgresql", "mysql"], i):
            progress(f"bulk: round {i} of {rounds}, {kind}")
            with tempfile.TemporaryDirectory(dir=folder) as own, new_database(kind, Path(own)) as url:
                run = ExperimentTracker("run", database_url=url)
                start = time.perf_counter()
                run.log_arrays("loss", values, steps)
                run.flush()
                section.add(f"ours on {kind}", (time.perf_counter() - start) / BULK * 1e6)
                run.close()
    return section


def reading(rounds: int, folder: Path) -> Section:
    """Return the milliseconds of reads from a database of eleven million points, and of starting a run there."""
    section = Section("a database of 11,000,000 points", unit="ms")
    url = f"sqlite:///{folder}/large.db"
    generator = np.random.default_rng(0)
    with ExperimentTracker("large", database_url=url) as run:
        for start in range(0, 10_000_000, 1_000_000):
            progress(f"reading: building, {start:,}")
            run.log_arrays("ten", generator.normal(size=1_000_000), np.arange(start, start + 1_000_000))
            run.flush()
        run.log_arrays("one", generator.normal(size=1_000_000), np.arange(1_000_000))
    for i in range(rounds + 1):
        progress(f"reading: round {i} of {rounds}")
        start = time.perf_counter()
        again = ExperimentTracker("next", database_url=url)
        section.add("open it and start a run", (time.perf_counter() - start) * 1e3)
        again.close()
        run = ExperimentTracker.resume(run.experiment_id, url)
        start = time.perf_counter()
        found = run.metric_history("one", max_points=None)
        made = np.frombuffer(found.values), np.array(found.steps)
        section.add("1,000,000 points into NumPy", (time.perf_counter() - start) * 1e3)
        assert len(made[0]) == len(made[1]) == 1_000_000
        start = time.perf_counter()
        curve = run.metric_history("ten", max_points=2000)
        section.add("a curve of 2,000 points out of 10,000,000", (time.perf_counter() - start) * 1e3)
        assert len(curve) > 1500
        run.close()
    return section


def searching(rounds: int, folder: Path) -> Section:
    """Return the milliseconds of a search over 10,000 experiments, 100 parameters and 50 metrics each, on SQLite."""
    section = Section("10,000 experiments x 100 parameters x 50 metrics: two conditions, ordered, limit 50", unit="ms")
    database = EnhancedDatabaseConnection(f"sqlite:///{folder}/many.db")
    for done in many_experiments(database):
        progress(f"searching: building, {done:,}")
    queries = Queries(database)
    for i in range(rounds + 1):
        progress(f"searching: round {i} of {rounds}")
        limit = 0.5 + i / 100  # never the same statement twice
        start = time.perf_counter()
        found = queries.search_experiments(
            f"metrics.metric_7.min < {limit} and config.parameter_3 >= 0.25",
            order_by="metrics.metric_9.max desc",
            limit=50,
        )
        section.add("ours", (time.perf_counter() - start) * 1e3)
        assert len(found) == 50
    database.close()
    return section


def many_experiments(database: EnhancedDatabaseConnection) -> Iterator[int]:
    """Store them, a few hundred in one transaction; yields how many there are."""
    chance = random.Random(0)
    for start in range(0, 10_000, 250):
        with database.transaction(durable=True):
            for number in range(start, start + 250):
                config = {f"parameter_{i}": chance.random() for i in range(100)}
                record = ExperimentRecord(
                    f"{number:036}", f"run {number}", "bench", created_at=float(number), config=config
                )
                database.experiments.create(record)
                points = {f"metric_{i}": _two_points(chance) for i in range(50)}
                database.metrics.append(record.id, points)
        yield start + 250


def _two_points(chance: random.Random) -> Columns:
    values = array("d", [chance.random(), chance.random()])
    return Columns(array("q", [0, 1]), array("q", [0, 1]), array("B"), values, array("d", [0.0, 1.0]))


def main() -> int:
    """Measure, tell, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row, after one to warm up")
    parser.add_argument("--folder", type=Path, help="where to store, to choose the disk; a temporary one when left out")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        facts = machine(folder, PACKAGES)
        one, ten = calls(options.rounds, folder), ten_values(options.rounds, folder)
        many, read = bulk(options.rounds, folder), reading(options.rounds, folder)
        search = searching(options.rounds, folder)
    figures = [
        Figure("one call a point on SQLite (300,000/s)", one.median("ours"), 1e6 / 300_000, "us"),
        Figure("the same against trackio", one.median("ours") / one.median("trackio"), 1 / 5),
        Figure("the same against MLflow", one.median("ours") / one.median("MLflow"), 1 / 1000),
        Figure("bulk on SQLite (700,000/s)", many.median("ours on sqlite"), 1e6 / 700_000, "us"),
        Figure("bulk on PostgreSQL (150,000/s)", many.median("ours on postgresql"), 1e6 / 150_000, "us"),
        Figure("bulk on MariaDB (80,000/s)", many.median("ours on mysql"), 1e6 / 80_000, "us"),
        Figure("one log_metrics of 10 values, in the caller's thread", ten.median("ours"), 10, "us"),
        Figure("1,000,000 points into NumPy", read.median("1,000,000 points into NumPy"), 500, "ms"),
        Figure("2,000 points out of 10,000,000", read.median("a curve of 2,000 points out of 10,000,000"), 50, "ms"),
        Figure("open a database of 11,000,000 points, start a run", read.median("open it and start a run"), 50, "ms"),
        Figure("search over 10,000 experiments", search.median("ours"), 20, "ms"),
    ]
    tell("track", facts, [one, ten, many, read, search], figures)
    return int(options.check and not all(figure.reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
