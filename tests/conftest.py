"""Fixtures shared by the tests, and the two sizes of the fault tests: short, and long with ``--torture``."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker

os.environ.setdefault("MODEL_CHECKPOINT_CAPTURE", "off")  # tests compare metadata and count calls; others test this


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[ExperimentTracker]:
    """A tracker on a database of its own; closed when the test ends."""
    tracker = ExperimentTracker("test", "tests", database_url=f"sqlite:///{tmp_path}/experiments.db")
    yield tracker
    tracker.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the fault tests in their long form")
    parser.addoption("--seed", type=int, help="repeat the random tests with this seed, which a failed one printed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # All faults and servers, which take a second for the tables of each test, so that what is quick comes first.
        if "faults" in item.path.parts or re.search("postgresql|mysql", item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Return how often to try: ``effort(short, long)``, where long is for ``make torture``."""
    return lambda short, long: long if request.config.getoption("--torture") else short


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A source of chance; its seed is printed, and ``--seed`` sets it."""
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Tell how many points a fault test tried; the summary adds them up."""
    return lambda points: record_property("points", points)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
    points: Counter[str] = Counter()
    violations = 0
    for report in reports:
        tried = sum(count for name, count in report.user_properties if name == "points")
        points[report.nodeid.partition("[")[0]] += tried
        violations += bool(tried) and report.failed
    if points.total():
        terminalreporter.section("faults")
        for name in sorted(name for name, count in points.items() if count):
            terminalreporter.line(f"{points[name]:>8,}  {name}")
        terminalreporter.line(f"{points.total():>8,}  points tried; tests that found a violation: {violations}")
