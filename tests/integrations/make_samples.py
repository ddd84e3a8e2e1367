"""Make the sample files: small stores of MLflow, trackio and TensorBoard, as these tools themselves write them.

Run by hand, from the root of the repository, with the tools installed; each part is made where its tool is there:

    pip install mlflow-skinny sqlalchemy alembic trackio tensorboardX     # mlflow.db, mlruns, trackio, tensorboardx
    pip install torch tensorboard                                         # torch
    python tests/integrations/make_samples.py

They were made with MLflow 3.17.2, trackio 0.43.0, tensorboardX 2.6.5, and torch 2.13.0 with tensorboard 2.21.0.
TensorFlow was not there: torch writes the tensors that hold a scalar as TensorFlow 2 does (``new_style=True``), and
those of other types and forms are put together in the tests.

What a tool notes of the machine is replaced after it has written: MLflow's artifact locations, user and script, the
host in the name of an event file, and the user in trackio's config. SQLite files get small pages, most of their tables
being empty.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"
ARTIFACTS = "mlflow-artifacts:/0/x"


def shrink(path: Path) -> None:
    """Write a SQLite file again with pages of 512 bytes, without what was overwritten; it keeps its journal mode."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        (mode,) = db.execute("PRAGMA journal_mode").fetchone()
        for statement in ("journal_mode=DELETE", "page_size=512"):
            db.execute(f"PRAGMA {statement}")
        db.execute("VACUUM")
        db.execute(f"PRAGMA journal_mode={mode}")


def log_mlflow_runs() -> None:
    """Four runs of one experiment: one with a nested one that failed, one that was killed, and one that is deleted."""
    import mlflow

    mlflow.set_experiment("digits")
    with mlflow.start_run(run_name="sweep: 'all' of \"it\" é"):
        mlflow.log_params({"lr": 0.1, "layers": 3, "optimizer": "sgd", "dropout": "NaN", "eps": "1e-08", "amp": True})
        mlflow.log_param("data/name", "first\nsecond")
        for step, loss in enumerate([1.5, 0.75, math.nan, math.inf, -math.inf]):
            mlflow.log_metric("val/loss", loss, step=step, timestamp=1_700_000_000_000 + 1000 * step)
            mlflow.log_metric("acc", step / 7, step=10 * step, timestamp=1_700_000_000_000 + 1000 * step)
        mlflow.log_metric("acc", 0.5, step=-3, timestamp=1_699_999_999_999)
        mlflow.set_tag("team", "vision")
        with mlflow.start_run(run_name="inner", nested=True):
            mlflow.log_metric("loss", 0.25)
            mlflow.end_run("FAILED")
    mlflow.start_run(run_name="killed")
    mlflow.end_run("KILLED")
    with mlflow.start_run(run_name="deleted") as run:
        mlflow.log_metric("loss", 1.0)
    mlflow.delete_run(run.info.run_id)


def make_mlflow(folder: Path) -> None:
    import mlflow

    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    log_mlflow_runs()
    with closing(sqlite3.connect("mlflow.db")) as db, db:
        db.execute("UPDATE runs SET artifact_uri = ?, user_id = 'somebody'", (ARTIFACTS,))
        db.execute("UPDATE experiments SET artifact_location = ?", (ARTIFACTS,))
        db.execute("UPDATE tags SET value = 'somebody' WHERE key = 'mlflow.user'")
        db.execute("UPDATE tags SET value = 'train.py' WHERE key = 'mlflow.source.name'")
    shrink(Path("mlflow.db"))
    shutil.copy("mlflow.db", SAMPLES / "mlflow.db")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    mlflow.set_tracking_uri(f"file://{folder}/mlruns")
    log_mlflow_runs()
    replaced = {"artifact_uri": ARTIFACTS, "artifact_location": ARTIFACTS, "user_id": "somebody"}
    for meta in Path("mlruns").rglob("meta.yaml"):
        lines = meta.read_text().splitlines()
        known = (line.partition(":")[0] for line in lines)
        meta.write_text("".join(f"{k}: {replaced[k]}\n" if k in replaced else f"{v}\n" for k, v in zip(known, lines)))
    for name, value in (("mlflow.user", "somebody"), ("mlflow.source.name", "train.py")):
        for tag in Path("mlruns").rglob(name):
            tag.write_text(value)
    shutil.copytree("mlruns", SAMPLES / "mlruns", dirs_exist_ok=True)


def make_trackio(folder: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    config = {"lr": 0.1, "limit": math.inf, "betas": [0.9, math.nan], "opt": {"name": "sgd"}}
    settings = {"project": "digits", "auto_log_cpu": False, "auto_log_gpu": False}
    trackio.init(name="one", config=config, **settings)
    trackio.log({"loss": 1.5, "acc": 0, "note": "warm-up"})
    trackio.log({"loss": math.nan, "acc": 1}, step=7)
    trackio.log({"loss": math.inf})
    trackio.log({"loss": -math.inf})
    trackio.finish()
    trackio.init(name="two", **settings)
    trackio.log({"loss": 0.25}, step=3)
    trackio.finish()
    path = folder / "digits.db"
    with closing(sqlite3.connect(path)) as db, db:
        sql = "UPDATE configs SET config = CAST(json_set(CAST(config AS TEXT), '$._Username', 'somebody') AS BLOB)"
        db.execute(sql)
    shrink(path)
    (SAMPLES / "trackio").mkdir(exist_ok=True)
    shutil.copy(path, SAMPLES / "trackio" / "digits.db")


def event_file(folder: Path, target: Path) -> None:
    """Copy the one event file of a folder, under a name that does not tell the host."""
    (path,) = folder.glob("events.out.tfevents.*")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target / "events.out.tfevents.1700000000.host.1.0")


def make_tensorboardx(folder: Path) -> None:
    from tensorboardX import SummaryWriter

    for name in ("train", "val"):
        with SummaryWriter(str(folder / name), write_to_disk=True) as writer:
            for step, loss in enumerate([1.5, 0.1, math.nan, math.inf, -math.inf]):
                writer.add_scalar("loss/" + name, loss, step, walltime=1_700_000_000.25 + step)
            writer.add_text("note", "some text", 1)
            writer.add_histogram("weights", [1.0, 2.0, 3.0], 2)
        event_file(folder / name, SAMPLES / "tensorboardx" / name)


def make_torch(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate([1.5, 0.1, math.nan]):
            writer.add_scalar("plain", loss, step, walltime=1_700_000_000.5 + step)
            writer.add_scalar("tensor", loss, step, new_style=True, walltime=1_700_000_000.5 + step)
            writer.add_scalar("double", loss, step, new_style=True, double_precision=True, walltime=1_700_000_009.0)
        writer.add_scalar("large step", 1.0, 2**40, walltime=1_700_000_010.0)
        writer.add_text("note", "some text", 1)
    event_file(folder, SAMPLES / "torch")


MAKERS = {
    "mlflow": make_mlflow,
    "trackio": make_trackio,
    "tensorboardX": make_tensorboardx,
    "tensorboard": make_torch,
}


if __name__ == "__main__":
    SAMPLES.mkdir(exist_ok=True)
    for module, make in MAKERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed; its samples stay as they are")
            continue
        with tempfile.TemporaryDirectory() as made:
            make(Path(made))
