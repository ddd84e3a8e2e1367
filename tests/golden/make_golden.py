"""Make the golden files: a database and a checkpoint directory of format version 1, as that version wrote them.

Run by hand, from the root of the repository, and only while version 1 has not been released:

    python tests/golden/make_golden.py

A released format never changes. When a version 2 comes, these files stay as they are and this script makes those of
version 2 beside them; ``tests/test_golden.py`` reads them all for ever. Needs numpy and torch; compression is gzip, so
that the standard library can read it.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import sys
import tempfile
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
sys.modules["zstandard"] = None  # type: ignore[assignment]  # gzip, whatever is installed

import numpy as np  # noqa: E402
import torch  # noqa: E402

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker  # noqa: E402

PLAIN: dict[Any, Any] = {
    "weights": array("f", [0.5, -0.0, 1.5]),
    "steps": array("q", [-(2**63), 0, 2**63 - 1]),
    "raw": b"\x00\xff\n",
    "buffer": bytearray(b"ab"),
    "nothing": b"",
    "plain": [1, 2.5, None, True, "größe 🎉", 2**80, -math.inf, math.nan, 1 + 2j],
    "nested": {"tuple": (1, (2, [3])), "set": {1, 2}, "frozen": frozenset({"a"}), 5: "integer key", "$odd": "$"},
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "empty": {},
}


def numpy_state() -> dict[str, Any]:
    return {
        "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.array([1.5, -2.0], dtype=np.float16),
        "bytes": np.array([[0, 255]], dtype=np.uint8),
        "flags": np.array([True, False]),
        "complex": np.array([1 + 2j], dtype=np.complex128),
        "zero_d": np.array(7, dtype=np.int32),
        "no_elements": np.zeros((0, 3), dtype=np.int64),
        "scalar": np.float32(0.1),
    }


def torch_state() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    model = {
        "embedding.weight": weight,
        "head.weight": weight,  # tied
        "transposed": weight.t(),  # shares the memory, too
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "float8": torch.tensor([0.5, 448.0], dtype=torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "zero_d": torch.tensor(7),
        "no_elements": torch.zeros(0, 3),
    }
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.25)
    parameter.grad = torch.tensor([0.5, -0.5])
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    return model, optimizer.state_dict(), scheduler.state_dict()


def make(folder: Path) -> None:
    url, directory = f"sqlite:///{folder}/database_v1.db", str(folder / "checkpoints_v1")
    with ExperimentTracker("golden sweep", "golden", database_url=url) as sweep:
        run = ExperimentTracker(
            "golden run",
            "golden",
            tags=["baseline", "größe", 50],
            config={
                "lr": 0.001,
                "optimizer": {"name": "adam", "betas": (0.9, 0.999)},
                "limit": math.inf,
                "gap": math.nan,
                "$float": "text",
                "seed": None,
            },
            database_url=url,
            parent=sweep,
            metadata={"host": "golden"},
        )
    for step, value in enumerate([0.5, math.nan, math.inf, -math.inf, -0.0, 1e-300]):
        run.log_metrics({"loss": value, "accuracy": step / 4}, step=step)
    run.log_metric("no step", 1.0)

    def manager(backend: str, compressed: bool, **options: Any) -> EnhancedCheckpointManager:
        return EnhancedCheckpointManager(
            run, directory, storage_backend=backend, enable_compression=compressed, max_checkpoints=None, **options
        )

    plain = manager("safetensors", False)
    plain.save_checkpoint(
        PLAIN,
        epoch=1,
        step=10,
        loss=0.5,
        val_loss=math.nan,
        metrics={"accuracy": 0.25, "odd": math.inf},
        config={"betas": [0.9, math.inf]},
        notes="plain",
        model_name="small",
    )
    doomed = plain.save_checkpoint({"w": b"deleted"}, epoch=2, loss=0.125, notes="deleted")
    manager("safetensors", True).save_checkpoint(PLAIN, epoch=3, loss=0.25, notes="plain gzip")
    plain.save_checkpoint(numpy_state(), epoch=4, val_loss=0.75, metrics={"accuracy": 0.5}, notes="numpy")
    model, optimizer, scheduler = torch_state()
    for number, (backend, compressed) in enumerate(
        [("safetensors", False), ("safetensors", True), ("pytorch", False), ("pytorch", True)]
    ):
        manager(backend, compressed).save_checkpoint(
            model,
            optimizer,
            scheduler,
            epoch=5 + number,
            loss=1.0,
            checkpoint_type="milestone",
            notes=f"torch {backend}{' gzip' if compressed else ''}",
            extra_state={"rng": b"\x01\x02"},
        )
    sharded = {f"part{i}": array("d", [float(i), -float(i)]) for i in range(4)}
    last = manager("safetensors", False, max_shard_size=32).save_checkpoint(
        sharded, epoch=9, notes="sharded", update_best=False
    )
    manager("safetensors", False, enable_integrity_checks=False).save_checkpoint(
        {"w": b"unhashed"}, epoch=10, notes="without digests"
    )
    plain.pin(last)
    plain.delete_checkpoint(doomed)
    plain.verify_experiment_integrity()
    run.close("interrupted")
    neutralise(folder / "database_v1.db")


def neutralise(database: Path) -> None:
    """Take out what belongs to the machine that made it; VACUUM, because SQLite leaves old bytes where they were."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("UPDATE checkpoints SET owner = 'golden 1'")
    connection.execute("UPDATE stores SET path = '/golden/checkpoints_v1'")
    connection.execute("VACUUM")
    connection.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make(folder)
        (folder / "checkpoints_v1" / ".engine" / "gc.lock").unlink()
        for name in ("database_v1.db", "checkpoints_v1"):
            target = HERE / name
            if target.is_dir():
                shutil.rmtree(target)
            (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, target)
    found = [Path(base, name) for base, _, names in os.walk(HERE / "checkpoints_v1") for name in names]
    size = sum(path.stat().st_size for path in [*found, HERE / "database_v1.db"])
    print(f"{len(found) + 1} files, {size:,} bytes in {HERE}")


if __name__ == "__main__":
    main()
