"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[ExperimentTracker]:
    """A tracker on a database of its own; closed when the test ends."""
    tracker = ExperimentTracker("test", "tests", database_url=f"sqlite:///{tmp_path}/experiments.db")
    yield tracker
    tracker.close()
