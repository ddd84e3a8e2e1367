"""Make the golden database of schema version 5, as that version wrote it.

Run by hand, from the root of the repository, and only while version 5 has not been released:

    python tests/golden/make_golden_database.py

A released schema never changes. When a version 6 comes, the file stays as it is and this script makes that of version
6 beside it, as it has done with those of versions 3 and 4; ``tests/test_golden.py`` opens them all for ever.
"""

from __future__ import annotations

import math
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ["MODEL_CHECKPOINT_CAPTURE"] = "off"  # what is captured names the machine

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker  # noqa: E402

VALUES = [0.5, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1 / 3]
STEPS = [None, 0, -1, 2**63 - 1, -(2**63), 5, 4]


def make(path: Path) -> None:
    """Write the database to ``path``, which must not exist."""
    with tempfile.TemporaryDirectory() as name:
        url = f"sqlite:///{name}/golden.db"
        config = {"lr": 1e-3, "layers": [64, 32], "net": {"act": "gelu", "deep": True}, "nothing": None}
        run = ExperimentTracker(
            "golden run", "golden", tags=["a", 5], config=config, database_url=url, metadata={"m": 1}
        )
        for value, step in zip(VALUES, STEPS):
            run.log_metrics({"odd": value, "größe/♥": 1.0}, step)
        run.log_arrays("long", [i / 7 for i in range(10_000)], range(0, 20_000, 2))
        with EnhancedCheckpointManager(run, f"{name}/c") as manager:
            saved = manager.save_checkpoint({"w": [1.0]}, loss=0.5, metrics={"acc": math.inf, "f1": math.nan}, epoch=1)
            run.log_arrays("long", [0.0] * 100, range(20_000, 20_100))
            later = manager.save_checkpoint({"w": [2.0]}, loss=0.25, metrics={"acc": 0.5}, epoch=2)
            manager.pin(later)
        run.close()
        run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved)
        run.log_metric("long", -1.0, 20_000)
        run.describe_project(tags=["p"], metadata={"owner": "golden"})
        run.database.experiments.set_captured(run.experiment_id, {"captured_at": 1.5, "git": None})
        run.child("golden child", tags=["c"]).close("failed")
        run.fork_from(saved, "golden fork").close()
        run.database.claims.add("golden grid", ['{"lr":0.1}', '{"lr":0.01}'])
        run.database.claims.take("golden grid", "golden worker", 1.0, 2.0, 3)
        run.close()
        with sqlite3.connect(f"{name}/golden.db") as connection:
            connection.execute("UPDATE stores SET path = '/golden/checkpoints'")
            connection.execute("UPDATE checkpoints SET owner = 'golden 1'")
            connection.commit()
            connection.execute("VACUUM INTO ?", (str(path),))
        connection.close()


if __name__ == "__main__":
    (HERE / "database_v5.db").unlink(missing_ok=True)
    make(HERE / "database_v5.db")
